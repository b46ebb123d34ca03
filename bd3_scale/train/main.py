"""What a rank runs."""

from __future__ import annotations

import os
import sys

from bd3_scale.recipe.schema import Recipe
from bd3_scale.resilience.heartbeat import Heartbeat
from bd3_scale.train.loop import train


def main(recipe: Recipe) -> None:
    """Train in this process; what a person can mend ends it with a message, without a traceback.

    The exit code is 2 where another try cannot help, 1 where ranks did not meet, which the network may mend.
    """
    try:
        with Heartbeat() as heartbeat:
            train(recipe, heartbeat)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("BD3_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, ConnectionError) else 2) from None
