"""Checkpoints in and out: import, export for serving, smaller formats."""
