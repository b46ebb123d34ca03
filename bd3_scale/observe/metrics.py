"""Metrics of a run: one JSON object a line in `metrics.jsonl`, and Weights & Biases beside it."""

from __future__ import annotations

import functools
import json
import logging
import math
import netrc
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast
from urllib.parse import urlsplit

from bd3_scale.recipe.schema import WandbRecipe
from bd3_scale.resilience.files import Lines, unused_path, write_atomically
from bd3_scale.resilience.readers import open_regular, read_regular, reader

if TYPE_CHECKING:
    import wandb

METRICS_FILE = "metrics.jsonl"
# Steps that stood out, and resumes that changed something.
EVENTS_FILE = "events.jsonl"
RESUMED = "resumed"
DAMAGED = ".damaged"
# An event lists the sequences of a batch, of which none has so many.
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
_WANDB_ID = re.compile(r"([A-Za-z0-9_-]{1,64})\s*")
Mode = Literal["online", "offline", "disabled"]
Value = float | int | None
T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_warned_of: set[Path] = set()


@reader("records of a run")
def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics or events file in order; none where there is no file.

    A last line that a killed run left unfinished is left out, and so are damaged lines, with a warning: those that are
    no JSON object with a whole number as `step`, and of metrics with other values than numbers and null. Metrics that
    an earlier version wrote have the names of this one.
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
    """Return the held-out NELBO by step, of those that are finite; as `read_metrics`."""
    return {
        record["step"]: record["eval/nelbo"] for record in read_metrics(path) if record.get("eval/nelbo") is not None
    }


def has_evaluation(path: Path, step: int) -> bool:
    """Return whether an evaluation at `step` is recorded."""
    return any(record["step"] == step and "eval/nelbo" in record for record in read_metrics(path))


def last_event(run: Path) -> int | None:
    """Return the last step of a run that stood out, if any did."""
    steps = [event["step"] for event in read_metrics(run / EVENTS_FILE) if event.get("kind") != RESUMED]
    return steps[-1] if steps else None


def truncate_after(path: Path, step: int, *, evaluates_again: bool = False) -> None:
    """Drop the records of steps after `step` and an unfinished last line, atomically; with `evaluates_again` also an
    evaluation at `step`.

    A file with damaged lines, see `read_metrics`, is kept beside as it was, under a name that ends in `.damaged`, and
    what is no regular file, such as a link, is moved there; both with a warning. OSError: the folder cannot be written.
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
    """Number, bytes and record of each finished line, None where it is damaged; too long a one comes in pieces."""
    number = 1
    with open_regular(path) as file:
        while (line := file.readline(LINE_LIMIT)).endswith(b"\n") or len(line) == LINE_LIMIT:
            yield number, line, parse_record(line)
            number += line.endswith(b"\n")


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record or event of a line under the names of this version, or None where the line is damaged."""
    try:
        record = json.loads(line.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < 1 << 63:
        return None
    if "kind" in record:  # an event, of which nothing else is reckoned with
        return record if isinstance(record["kind"], str) else None
    if not all(value is None or _is_finite(value) for value in record.values()):
        return None
    return {_current_name(key): value for key, value in record.items()}


# Of a hundred thousand records each has the same names; those of a stranger's file are bounded.
@functools.lru_cache(4096)
def _current_name(key: str) -> str:
    """Return the name that a metric has in this version."""
    start, rest = cast(re.Match[str], _NAME.fullmatch(key)).groups(default="")
    return _EARLIER_NAMES.get(start, start) + rest


def _is_finite(value: object) -> bool:
    # JSON knows numbers that no float holds, and an axis of a picture must still hold differences.
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


class MetricsWriter:
    """Appends records to `run_dir/metrics.jsonl` and logs them to Weights & Biases; for one process of a run.

    after_step: the step that training goes on from; what an earlier attempt recorded after it is dropped, since those
    steps are taken again; evaluates_again: and so is an evaluation at that step. name and config: what Weights & Biases
    shows; the run's id is kept in `run_dir/wandb_id`, so that a resumed run stays one. Offline, the choice of "auto"
    without a key, it writes to `run_dir/wandb` for `wandb sync`. If either fails, it warns once and the run goes on.

    Damaged lines of an earlier attempt are set aside, see `truncate_after`. OSError: the file cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        recipe: WandbRecipe,
        *,
        after_step: int,
        name: str,
        config: Mapping[str, Any],
        evaluates_again: bool = False,
    ) -> None:
        path = run_dir / METRICS_FILE
        truncate_after(path, after_step, evaluates_again=evaluates_again)
        self._file = Lines(path)
        self._wandb: wandb.Run | None = None
        if (mode := _wandb_mode(recipe.mode)) != "disabled":
            self._wandb = _unless_wandb_fails(lambda: _start_wandb(run_dir, recipe, mode, name, config))

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if (run := self._wandb) is not None:
            _unless_wandb_fails(lambda: run.finish(exit_code=0 if error is None else 1))

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Write one record. A number that is not finite becomes null, which JSON can say."""
        record = {"step": step} | {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps(record))
        if (run := self._wandb) is not None:
            self._wandb = _unless_wandb_fails(lambda: _log(run, {"step": step, **values}))


def _wandb_mode(mode: Literal["auto"] | Mode) -> Mode:
    if mode != "auto":
        return mode
    return cast(Mode, os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline"))


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):  # missing, or not one that wandb could read either
        return False


def _start_wandb(run_dir: Path, recipe: WandbRecipe, mode: Mode, name: str, config: Mapping[str, Any]) -> wandb.Run:
    import wandb

    run = wandb.init(
        mode=mode,
        project=recipe.project,
        entity=recipe.entity,
        name=name,
        id=_wandb_id(run_dir / "wandb_id"),
        resume="allow" if mode == "online" else None,
        dir=run_dir,
        config=dict(config),
        # The console is the progress bar's, and a dead network must not hold a finished job.
        settings=wandb.Settings(console="off", quiet=True, silent=mode == "offline", finish_timeout=60),
    )
    # wandb's own counter refuses to go back, as it must where a resumed run takes steps again.
    run.define_metric("*", step_metric="step")
    return run


def _wandb_id(path: Path) -> str:
    """The run's id, drawn where there is none or what lies there cannot be one."""
    with suppress(FileNotFoundError, ValueError):
        if found := _WANDB_ID.fullmatch(read_regular(path, 1 << 10).decode()):
            return found[1]
    if os.path.lexists(path):
        _LOG.warning("%s holds no id of a run of Weights & Biases, and a new one is drawn", path)
    new = secrets.token_hex(8)
    write_atomically(path, new)
    return new


def _log(run: wandb.Run, values: dict[str, Value]) -> wandb.Run:
    run.log(values)
    return run


def _unless_wandb_fails(action: Callable[[], T]) -> T | None:
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - wandb raises many kinds, most of them plain; none may end a training
        warnings.warn(
            f"Weights & Biases failed and is off from here on, metrics.jsonl goes on: {error!r}", stacklevel=3
        )
        return None
