"""Helpers that every other folder may import: files, names, read limits, safe loading, locks between threads."""
