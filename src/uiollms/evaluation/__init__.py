"""Scores of held-out documents, their controls and statistics, and lm-eval."""
