"""Find the checkpoints of a run.

A checkpoint is a folder `step-<n>`: safetensors files, an index, the tokeniser and a manifest. It is written under a
temporary name that starts with a dot, synced and renamed, so that a folder without the dot is always complete. The file
`latest` holds the name of the newest one, for people and scripts.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from bd3_scale.checkpoint.manifest import MANIFEST
from bd3_scale.resilience.files import remove_partial_files, write_atomically

_STEP = re.compile(r"step-(\d{8,})")
_LOG = logging.getLogger(__name__)
PARTIAL = ".partial-"
LATEST = "latest"
GGUF_ENDING = ".gguf"


def step_of(folder: Path) -> int | None:
    """Return the step that a checkpoint's folder is named by, or None where it has another name."""
    return int(match[1]) if (match := _STEP.fullmatch(folder.name)) else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run's checkpoint folder, oldest first."""
    checkpoints = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(checkpoints, key=lambda path: step_of(path) or 0)


def resolve_checkpoint(path: Path) -> Path:
    """Return `path` itself if it is a checkpoint, or the newest one of a run directory.

    Raises:
        ValueError: there is none.
    """
    refuse_gguf(path)
    if (path / MANIFEST).is_file():
        return path
    checkpoints = list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise ValueError(f"{path} is neither a checkpoint nor a run directory with one in {path / 'checkpoints'}")
    return checkpoints[-1]


def refuse_gguf(path: Path) -> None:
    """Raise ValueError if `path` is a file for llama.cpp (GGUF), where a checkpoint must be given."""
    if path.suffix == GGUF_ENDING:
        raise ValueError(
            f"{path} is a file for llama.cpp; only `generate`, `evaluate`, `generative` and `convert inspect` read "
            "such files. Give the checkpoint that it was made from"
        )


def remove_partial(folder: Path) -> list[Path]:
    """Remove what a killed save left behind and return its paths. What cannot be removed stays, with a warning."""
    left = sorted(folder.glob(f"{PARTIAL}*")) if folder.is_dir() else []
    for path in left:
        try:
            shutil.rmtree(path)
        except OSError as error:
            _LOG.warning("%s is left over and cannot be removed: %s", path, error)
    remove_partial_files(folder)
    return left


def name_latest(folder: Path) -> None:
    """Write the name of the newest checkpoint of `folder` to the file `latest`, where it is not there yet."""
    text = list_checkpoints(folder)[-1].name + "\n"
    latest = folder / LATEST
    if not latest.is_file() or latest.read_bytes() != text.encode():
        write_atomically(latest, text)
