"""Inject faults into a run at named points, for tests and drills; each fault happens once per rank and run directory.

    bd3-scale train recipe.yaml --inject 'kill@step:step=5,rank=1; full@save.write:step=8; nan@gradient:step=3'

| point                                     | when the run reaches it                                                  |
|-------------------------------------------|--------------------------------------------------------------------------|
| start                                     | after the rendezvous of the ranks                                        |
| step                                      | before an optimiser step                                                 |
| gradient                                  | during the backward pass of a step                                       |
| collective                                | after a step, when ranks agree whether to stop                           |
| evaluation                                | before an evaluation                                                     |
| save.begin, save.write, save.commit,      | before a save makes its folder, writes its tensors, writes its manifest, |
| save.rename, save.link, save.remove       | renames the folder, sets `latest`, removes old checkpoints               |

Actions: kill (SIGKILL), stop (SIGSTOP), delay (`seconds=`), nan (in a gradient), flip (a bit in the save's largest
file), and the errors full (ENOSPC), fail (EIO) and readonly (EROFS). Without `step=` a fault happens at the first step
that reaches its point; without `rank=` it happens on every rank.
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
# At these points the files of a save exist and their hashes are known, so verification must notice the flipped bit.
_FLIPS = ("save.commit", "save.rename")
ACTIONS = ("kill", "stop", "delay", "nan", "flip", *_ERRORS)


@dataclass(frozen=True)
class Fault:
    """One fault: what happens, at which point, and on which step and rank (None: any)."""

    action: str
    point: str
    step: int | None = None
    rank: int | None = None
    seconds: float = 1.0

    def __str__(self) -> str:
        return f"{self.action}@{self.point}:step={self.step},rank={self.rank},seconds={self.seconds:g}"


def parse_faults(text: str) -> list[Fault]:
    """Parse faults that are separated by `;`. ValueError: names the part that is wrong and shows the syntax."""
    return [_parse(part.strip()) for part in text.split(";") if part.strip()]


def _parse(text: str) -> Fault:
    match = re.fullmatch(r"(\w+)@([\w.]+)(?::(.*))?", text)
    if not match or match[1] not in ACTIONS or match[2] not in POINTS:
        raise ValueError(
            f"fault {text!r} is not ACTION@POINT or ACTION@POINT:step=N,rank=K,seconds=S with an action among "
            f"{', '.join(ACTIONS)} and a point among {', '.join(POINTS)}"
        )
    if (match[1] == "nan") != (match[2] == "gradient") or (match[1] == "flip" and match[2] not in _FLIPS):
        raise ValueError(
            f"fault {text!r}: nan works at the point gradient only, and flip at {' and '.join(_FLIPS)} only; the point "
            "gradient takes nan only"
        )
    options: dict[str, float] = {}
    for option in filter(None, (match[3] or "").split(",")):
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
    return Fault(match[1], match[2], **options)  # type: ignore[arg-type]


class _Armed:
    """The faults of this process, the folder of their marks, and the current step."""

    faults: Sequence[Fault] = ()
    folder = Path()
    step = 0


def arm(run_dir: Path) -> None:
    """Load the faults of $BD3_SCALE_FAULTS for a run. ValueError as `parse_faults`."""
    _Armed.faults = parse_faults(os.environ.get(VARIABLE, ""))
    _Armed.folder = run_dir / "faults"
    if _Armed.faults:
        _Armed.folder.mkdir(parents=True, exist_ok=True)
        if os.environ.get("RANK", "0") == "0":
            _LOG.warning("faults will be injected: %s", "; ".join(map(str, _Armed.faults)))


def reach(point: str, *, step: int | None = None, folder: Path | None = None) -> None:
    """Inject the faults that are armed for this point of the run.

    `step` defaults to the step of the last point that gave one. OSError: an injected error.
    """
    if not _Armed.faults:
        return
    if step is not None and not point.startswith("save."):
        _Armed.step = step
    for fault in _due(point, step):
        _trigger(fault, folder)


def is_poisoned(step: int) -> bool:
    """Return whether a gradient of `step` is to be NaN on this rank."""
    return bool(_Armed.faults) and bool(list(_due("gradient", step)))


def _due(point: str, step: int | None) -> list[Fault]:
    rank = int(os.environ.get("RANK", "0"))
    current_step = _Armed.step if step is None else step
    return [
        fault
        for fault in _Armed.faults
        if fault.point == point
        and fault.step in (None, current_step)
        and fault.rank in (None, rank)
        and _claim(fault, rank if fault.rank is None else fault.rank)
    ]


def _claim(fault: Fault, rank: int) -> bool:
    """Create the mark of a fault; return False if it exists: a restarted run must not meet the same fault again."""
    try:
        (_Armed.folder / f"{fault}@{rank}".replace("/", "_")).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _trigger(fault: Fault, folder: Path | None) -> None:
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
