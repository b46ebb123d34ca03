"""Run one rank of a training: `python -m bd3_scale.train [--replay=STEP] FILE [key=value …]`, as launchers start it.

FILE: the recipe as the launcher resolved and checked it; what a node has otherwise, such as its cache, comes after it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bd3_scale.observe.libraries import quieten_libraries
from bd3_scale.recipe.load import load_recipe
from bd3_scale.registry import import_plugins
from bd3_scale.resilience.limits import check_limits
from bd3_scale.resilience.output import label_rank_output, rank_log, survive_broken_streams
from bd3_scale.resilience.terminal import clean_diagnostics, tell

if __name__ == "__main__":
    quieten_libraries()
    clean_diagnostics()
    arguments = sys.argv[1:]
    step = int(arguments.pop(0).partition("=")[2]) if arguments[0].startswith("--replay=") else None
    try:
        check_limits()
        recipe = load_recipe(Path(arguments[0]), arguments[1:])
        if step is None:
            # Before libraries are imported, which keep the streams of then.
            survive_broken_streams("stdout", "stderr", log=rank_log(recipe.run_path))
        import_plugins(recipe.plugins)
    except ValueError as error:
        tell(f"error: {error}")
        sys.exit(2)
    from bd3_scale.train.main import main, main_of_replay

    if step is None:
        label_rank_output(recipe.run_path)
        main(recipe)
    else:
        main_of_replay(recipe, step)
