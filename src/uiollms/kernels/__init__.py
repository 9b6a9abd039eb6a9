"""Devices, memory, and what makes the arithmetic fast; without it the numbers are the same."""
