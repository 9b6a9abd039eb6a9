"""Weights on disk: base models, adapters, whole model folders."""
