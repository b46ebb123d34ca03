"""Sampling text block by block."""
