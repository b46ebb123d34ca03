"""`bd3-scale convert inspect` as a script; `--help` says what it takes."""

import sys

from bd3_scale.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "inspect"]
    main()
