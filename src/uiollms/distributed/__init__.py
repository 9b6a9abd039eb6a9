"""Processes that train together, and where the modules of a base lie."""
