"""Run the command line as `python -m bd3_scale`."""

from __future__ import annotations

from bd3_scale.cli import main

if __name__ == "__main__":
    main()
