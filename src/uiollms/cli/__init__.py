"""The commands of `python -m uiollms`, and the functions that they have in common."""
