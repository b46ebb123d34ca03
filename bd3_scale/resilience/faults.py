"""Faults on demand, for tests and game days: at named points of a run, once on each rank of a run directory.

    bd3-scale train recipe.yaml --inject 'kill@step:step=5,rank=1; full@save.write:step=8; nan@gradient:step=3'

| point                                     | when it is passed                                                        |
|-------------------------------------------|--------------------------------------------------------------------------|
| start                                     | ranks have met                                                           |
| step                                      | before an optimiser step                                                 |
| gradient                                  | while the backward pass of a step runs                                   |
| collective                                | after a step, when ranks ask each other whether to stop                  |
| evaluation                                | before an evaluation                                                     |
| save.begin, save.write, save.commit,      | before a save's folder is made, its tensors are written, its manifest is |
| save.rename, save.link, save.remove       | written, it gets its name, `latest` is set, old checkpoints are removed  |

Actions: kill (SIGKILL), stop (SIGSTOP), delay (`seconds=`), nan (in a gradient), flip (a byte of the save's largest
file), and the errors full (ENOSPC), fail (EIO) and readonly (EROFS). Without `step=` or `rank=` any will do:
a fault without `rank=` happens on all of them.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LOG = logging.getLogger(__name__)
VARIABLE = "BD3_SCALE_FAULTS"
POINTS = (
    "start",
    "step",
    "gradient",
    "collective",
    "evaluation",
    *(f"save.{part}" for part in ("begin", "write", "commit", "rename", "link", "remove")),
)
_ERRORS = {"full": errno.ENOSPC, "fail": errno.EIO, "readonly": errno.EROFS}
# A save's files are there, and their hashes known.
_FLIPS = ("save.commit", "save.rename")
ACTIONS = ("kill", "stop", "delay", "nan", "flip", *_ERRORS)


@dataclass(frozen=True)
class Fault:
    action: str
    point: str
    step: int | None = None
    rank: int | None = None
    seconds: float = 1.0

    def __str__(self) -> str:
        return f"{self.action}@{self.point}:step={self.step},rank={self.rank},seconds={self.seconds:g}"


def parse_faults(text: str) -> list[Fault]:
    """ValueError: what is not understood, and what would be."""
    return [_parse(part.strip()) for part in text.split(";") if part.strip()]


def _parse(text: str) -> Fault:
    found = re.fullmatch(r"(\w+)@([\w.]+)(?::(.*))?", text)
    if not found or found[1] not in ACTIONS or found[2] not in POINTS:
        raise ValueError(
            f"fault {text!r} is not ACTION@POINT or ACTION@POINT:step=N,rank=K,seconds=S with an action among "
            f"{', '.join(ACTIONS)} and a point among {', '.join(POINTS)}"
        )
    if (found[1] == "nan") != (found[2] == "gradient") or (found[1] == "flip" and found[2] not in _FLIPS):
        raise ValueError(f"fault {text!r}: nan belongs to the point gradient, and flip to {' and '.join(_FLIPS)}")
    options: dict[str, float] = {}
    for option in filter(None, (found[3] or "").split(",")):
        name, _, value = option.partition("=")
        number = float if name == "seconds" else int
        try:
            if name not in ("step", "rank", "seconds"):
                raise ValueError
            options[name] = number(value)
            if not 0 <= options[name] < math.inf:
                raise ValueError
        except ValueError:
            raise ValueError(f"fault {text!r}: {option!r} is none of step=N, rank=K, seconds=S") from None
    return Fault(found[1], found[2], **options)  # type: ignore[arg-type]


class _Armed:
    """The faults of this process, where their marks lie, and the step that a point belongs to."""

    faults: Sequence[Fault] = ()
    folder = Path()
    step = 0


def arm(run_dir: Path) -> None:
    """Take the faults of $BD3_SCALE_FAULTS for a run. ValueError as `parse_faults`."""
    _Armed.faults = parse_faults(os.environ.get(VARIABLE, ""))
    _Armed.folder = run_dir / "faults"
    if _Armed.faults:
        _Armed.folder.mkdir(parents=True, exist_ok=True)
        if os.environ.get("RANK", "0") == "0":
            _LOG.warning("faults will be injected: %s", "; ".join(map(str, _Armed.faults)))


def reach(point: str, *, step: int | None = None, folder: Path | None = None) -> None:
    """A point of the run; where a fault is armed for it, it happens. `step`: by default that of the point before.

    OSError: one that was asked for.
    """
    if not _Armed.faults:
        return
    if step is not None and not point.startswith("save."):
        _Armed.step = step
    for fault in _due(point, step):
        _happen(fault, folder)


def is_poisoned(step: int) -> bool:
    """Whether a gradient of `step` is to be NaN on this rank."""
    return bool(_Armed.faults) and bool(list(_due("gradient", step)))


def _due(point: str, step: int | None) -> list[Fault]:
    rank = int(os.environ.get("RANK", "0"))
    here = _Armed.step if step is None else step
    return [
        fault
        for fault in _Armed.faults
        if fault.point == point
        and fault.step in (None, here)
        and fault.rank in (None, rank)
        and _first(fault, rank if fault.rank is None else fault.rank)
    ]


def _first(fault: Fault, rank: int) -> bool:
    try:
        (_Armed.folder / f"{fault}@{rank}".replace("/", "_")).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _happen(fault: Fault, folder: Path | None) -> None:
    if fault.action in _ERRORS:
        number = _ERRORS[fault.action]
        raise OSError(number, f"{os.strerror(number)} (injected)")
    if fault.action == "delay":
        time.sleep(fault.seconds)
    elif fault.action == "flip":
        assert folder is not None
        _flip(folder)
    else:
        os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP)


def _flip(folder: Path) -> None:
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
