"""Let the tests of this folder share `models.py`."""
