"""Gradient estimators, the training step, optimizer, samples and stages."""
