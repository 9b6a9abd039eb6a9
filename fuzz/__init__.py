"""Attacks on every command with hostile files, options and kills: `python -m fuzz`;
docs/fuzz.md."""
