"""Studies of the gradient estimators: bias, variance, time, memory, and what they learn."""
