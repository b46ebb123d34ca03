"""`python -m bd3_scale.train RECIPE [key=value …]`: one rank of a run, as the launchers start it."""

from __future__ import annotations

import sys
from pathlib import Path

from bd3_scale.observe.warnings import quieten_libraries
from bd3_scale.recipe.load import load_recipe

if __name__ == "__main__":
    quieten_libraries()
    from bd3_scale.train.main import main

    main(load_recipe(Path(sys.argv[1]), sys.argv[2:]))
