"""Folders that appear complete or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bd3_scale.resilience.files import sync


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill aside; it is flushed to disk and renamed to `out` at the end, or removed if the block raises.

    Raises FileExistsError if `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    aside.mkdir()
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside)
        raise
    sync(out.parent)
