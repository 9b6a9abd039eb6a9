"""Plans a run without its machine: memory of a training step on simulated devices, and FLOPs."""
