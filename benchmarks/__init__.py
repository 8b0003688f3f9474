"""Measurements against a baseline in the same run; see `python -m benchmarks --help`."""
