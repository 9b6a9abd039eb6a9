"""Scores models on held-out documents, compares memory with its controls, and runs lm-eval."""
