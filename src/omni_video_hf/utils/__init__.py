"""Helpers without a subject of their own, which every other folder may import."""
