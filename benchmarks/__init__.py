"""Measures speed, memory and utilisation: `python -m benchmarks --help`."""
