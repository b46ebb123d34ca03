"""Reproduce the paper's tables in small; `python -m reproduction` is the command."""
