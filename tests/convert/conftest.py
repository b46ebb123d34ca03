"""Tests of this folder share `models.py`."""
