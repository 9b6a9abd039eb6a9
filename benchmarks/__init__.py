"""How fast, how small, how close to the machine: `python -m benchmarks --help`."""
