"""`python -m bd3_scale.train [--replay=STEP] RECIPE [key=value …]`: one rank of a run, as the launchers start it."""

from __future__ import annotations

import sys
from pathlib import Path

from bd3_scale.observe.warnings import quieten_libraries
from bd3_scale.recipe.load import load_recipe
from bd3_scale.resilience.limits import check_limits

if __name__ == "__main__":
    quieten_libraries()
    try:
        check_limits()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from bd3_scale.train.main import main, main_of_replay

    arguments = sys.argv[1:]
    if arguments[0].startswith("--replay="):
        step = int(arguments.pop(0).partition("=")[2])
        main_of_replay(load_recipe(Path(arguments[0]), arguments[1:]), step)
    else:
        main(load_recipe(Path(arguments[0]), arguments[1:]))
