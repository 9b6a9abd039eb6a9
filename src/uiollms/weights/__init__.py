"""Load and save weights: base models, adapters and whole model folders."""
