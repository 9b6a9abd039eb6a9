"""Attacks on every command with hostile files, options and kills. `python -m fuzz` runs them, and
docs/fuzz.md describes them."""
