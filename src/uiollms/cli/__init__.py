"""The commands of `python -m uiollms`, and what they share with train.py and test.py."""
