"""What a training step takes on every device, counted on pretended ones."""
