"""The commands of `uiollms`, and the functions that they have in common."""
