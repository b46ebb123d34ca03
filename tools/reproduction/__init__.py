"""The paper's tables in small; `python tools/reproduce.py` is the command."""
