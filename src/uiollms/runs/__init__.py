"""A run folder: checkpoints, metrics, signals, and what is checked before a run begins."""
