"""Skip or fail tests where a machine lacks what they need."""

from __future__ import annotations

import os

import pytest


def unavailable(reason: str) -> None:
    """Skip the test, or fail it where every check has to run, as in continuous integration."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
