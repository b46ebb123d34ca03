"""Read the metrics and events of a run, and drop the records of steps that are taken again."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from bd3_scale.resilience.files import unused_path, write_atomically
from bd3_scale.resilience.readers import open_regular, reader

METRICS_FILE = "metrics.jsonl"
# Unusual steps, and resumes with changed options.
EVENTS_FILE = "events.jsonl"
# Texts that evaluations wrote.
SAMPLES_FILE = "samples.jsonl"
# Each line of these files says with `kind` what it records; a line of metrics holds numbers alone.
_FILES_WITH_KIND = (EVENTS_FILE, SAMPLES_FILE)
RESUMED = "resumed"
DAMAGED = ".damaged"
# No line is so long: the longest are events, which list the sequences of a batch.
LINE_LIMIT = 1 << 24
# What versions before 0.2.0 called a metric; a name that ends in `_block_8` or `_source_web` is renamed by its start.
_EARLIER_NAMES = {
    "train_loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "tokens": "train/tokens",
    "tokens_per_second": "perf/tokens_per_second",
    "mfu": "perf/mfu",
    "peak_rss_bytes": "memory/peak_rss_bytes",
    "peak_cuda_bytes": "memory/peak_cuda_bytes",
    "nelbo": "eval/nelbo",
    "nelbo_text_standard_error": "eval/nelbo_text_standard_error",
    "nelbo_noise_standard_error": "eval/nelbo_noise_standard_error",
    "perplexity": "eval/perplexity",
    "mask_rate_low": "interval/mask_rate_low",
    "mask_rate_high": "interval/mask_rate_high",
    "loss_variance": "interval/loss_variance",
    "loss_variance_unclipped": "interval/loss_variance_unclipped",
    "checkpoint_tries": "checkpoint/tries",
    "checkpoint_failed": "checkpoint/failed",
    "checkpoint_blocked_seconds": "checkpoint/blocked_seconds",
    "checkpoint_seconds": "checkpoint/seconds",
    "checkpoint_slowdown": "checkpoint/slowdown",
}
_NAME = re.compile(r"(.*?)((?:_block_|_source_).*)?", re.DOTALL)

_LOG = logging.getLogger(__name__)
_warned_of: set[Path] = set()


@reader("records of a run")
def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics, events or samples file in order; [] if there is no file.

    An unfinished last line of a killed run is left out. Damaged lines are left out with a warning, see `parse_record`.
    """
    records: list[dict[str, Any]] = []
    damaged: set[int] = set()
    try:
        for number, _, record in _lines(path):
            if record is None:
                damaged.add(number)
            else:
                records.append(record)
    except FileNotFoundError:
        pass
    except (ValueError, IsADirectoryError) as error:
        _warn_once(path, str(error))
    if damaged:
        _warn_once(path, f"{_what_is_damaged(path, damaged)}: left out here")
    return records


def read_nelbos(path: Path) -> dict[int, float]:
    """Return the finite held-out NELBOs by step, read as `read_metrics` does."""
    return {
        record["step"]: record["eval/nelbo"] for record in read_metrics(path) if record.get("eval/nelbo") is not None
    }


def has_evaluation(path: Path, step: int) -> bool:
    """Return whether an evaluation at `step` is recorded."""
    return any(record["step"] == step and "eval/nelbo" in record for record in read_metrics(path))


def last_event(run: Path) -> int | None:
    """Return the last unusual step of a run, None if there is none."""
    steps = [event["step"] for event in read_metrics(run / EVENTS_FILE) if event["kind"] != RESUMED]
    return steps[-1] if steps else None


def truncate_after(path: Path, step: int, *, evaluates_again: bool = False) -> None:
    """Drop the records of steps after `step` and an unfinished last line, atomically; with `evaluates_again` also an
    evaluation at `step`.

    A file with damaged lines, see `read_metrics`, is first copied to a name that ends in `.damaged`; a path that is no
    regular file, such as a link, is renamed so. Both give a warning. OSError: the folder cannot be written.
    """
    if not os.path.lexists(path):
        return
    aside = unused_path(path.with_name(path.name + DAMAGED))
    if not stat.S_ISREG(path.lstat().st_mode):
        path.rename(aside)
        _LOG.warning("%s is no regular file, and is moved to %s", path, aside.name)
        return
    kept, damaged = [], set()
    for number, line, record in _lines(path):
        if record is None:
            damaged.add(number)
        elif record["step"] <= step and not (evaluates_again and record["step"] == step and "eval/nelbo" in record):
            kept.append(line)
    if damaged:
        shutil.copyfile(path, aside)
        _LOG.warning("%s: dropped, and the file as it was is kept as %s", _what_is_damaged(path, damaged), aside.name)
    write_atomically(path, b"".join(kept))


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Yield number, bytes and record of each finished line, None if it is damaged; a too long line comes in pieces."""
    number = 1
    with open_regular(path) as file:
        while (line := file.readline(LINE_LIMIT)).endswith(b"\n") or len(line) == LINE_LIMIT:
            yield number, line, parse_record(line, path)
            number += line.endswith(b"\n")


def parse_record(line: bytes, path: Path) -> dict[str, Any] | None:
    """Return the record of a line of the file `path`, or None where the line is damaged.

    A record is a JSON object with a whole number as `step`. In `events.jsonl` and `samples.jsonl` it has a text as
    `kind`, and its other values are free. In a metrics file it has no `kind`, its other values are numbers, returned
    as float, or null, and metrics of earlier versions get the names of this version.
    """
    try:
        record = json.loads(line.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < 1 << 63:
        return None
    if path.name in _FILES_WITH_KIND:
        return record if isinstance(record.get("kind"), str) else None
    step = record.pop("step")
    if "kind" in record or not all(value is None or _is_finite(value) for value in record.values()):
        return None
    # NumPy holds an integer of more than 64 bits as an object, with which it cannot calculate.
    values = {_current_name(key): None if value is None else float(value) for key, value in record.items()}
    return {"step": step, **values}


# Of a hundred thousand records each has the same names; those of a stranger's file are bounded.
@functools.lru_cache(4096)
def _current_name(key: str) -> str:
    """Return the name that a metric has in this version."""
    start, rest = cast(re.Match[str], _NAME.fullmatch(key)).groups(default="")
    return _EARLIER_NAMES.get(start, start) + rest


def _is_finite(value: object) -> bool:
    # JSON allows numbers beyond all floats, and the axis of a picture must still be able to hold differences.
    return type(value) in (int, float) and abs(cast(float, value)) < 1e300


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _what_is_damaged(path: Path, lines: set[int]) -> str:
    how_many = "a damaged line" if len(lines) == 1 else f"{len(lines)} damaged lines"
    return f"{path} has {how_many}, from line {min(lines)} on"


def _warn_once(path: Path, text: str) -> None:
    if path.absolute() not in _warned_of:
        _warned_of.add(path.absolute())
        _LOG.warning("%s", text)
