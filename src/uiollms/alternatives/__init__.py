"""What a user would pick instead of a learned memory, given as many slots."""
