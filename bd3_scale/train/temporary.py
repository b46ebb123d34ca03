"""Where a rank and the libraries that it uses put their temporary files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bd3_scale.resilience.leftovers import private_folder, temporary_folder

COMPILED = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def own_temporary_files() -> Iterator[None]:
    """Inside, the temporary folder of this process and of those it starts is one that goes with it (see `own_folder`).

    Weights & Biases and PyTorch leave theirs behind where a run is killed. What torch.compile made for a GPU stays for
    the next run, in a folder that nobody else can write: it is code that runs.

    Raises:
        OSError: the temporary folder (TMPDIR) cannot be written or is full.
    """
    shared = Path(tempfile.gettempdir())
    with temporary_folder("rank") as folder:
        own = {"TMPDIR": str(folder)}
        if torch.cuda.is_available() and COMPILED not in os.environ:
            kept = private_folder(shared / f"bd3_scale-compiled-{os.geteuid()}")
            own |= {COMPILED: str(kept)} if kept else {}
        before = {name: os.environ.get(name) for name in own}
        os.environ |= own
        tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = str(shared)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
