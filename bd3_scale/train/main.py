"""What a rank runs."""

from __future__ import annotations

import os
import sys

from bd3_scale.recipe.schema import Recipe
from bd3_scale.train.loop import train


def main(recipe: Recipe) -> None:
    """Train in this process; what a person can mend ends it with a message and exit code 2, without a traceback."""
    try:
        train(recipe)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("BD3_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
