"""What to do where a machine lacks what a test needs."""

from __future__ import annotations

import os

import pytest


def unavailable(reason: str) -> None:
    """A skip that is none where every check has to run."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
