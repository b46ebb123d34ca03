"""Metrics of a run: one JSON object a line in `metrics.jsonl`, and Weights & Biases beside it."""

from __future__ import annotations

import json
import math
import netrc
import os
import secrets
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast
from urllib.parse import urlsplit

from bd3_scale.recipe.schema import WandbRecipe
from bd3_scale.resilience.files import Lines, write_atomically

if TYPE_CHECKING:
    import wandb

METRICS_FILE = "metrics.jsonl"
# Steps that stood out, and resumes that changed something.
EVENTS_FILE = "events.jsonl"
RESUMED = "resumed"
Mode = Literal["online", "offline", "disabled"]
Value = float | int | str | None
T = TypeVar("T")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in order, without a last line that a killed run left unfinished.

    ValueError: another line that is not a JSON object, named with its number.
    """
    lines = path.read_text(errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, line {number} is not a JSON object: {line[:80]!r}; repair it or move the file away"
            )
        records.append(record)
    return records


def read_nelbos(path: Path) -> dict[int, float]:
    """Held-out NELBO by step, of those that are finite; none where there is no file. ValueError as `read_metrics`."""
    records = read_metrics(path) if path.exists() else []
    return {record["step"]: record["nelbo"] for record in records if record.get("nelbo") is not None}


def has_evaluation(path: Path, step: int) -> bool:
    """Whether an evaluation at `step` is recorded."""
    return path.exists() and any(r.get("step") == step and "nelbo" in r for r in read_metrics(path))


def last_event(run: Path) -> int | None:
    """The last step of a run that stood out, if any did. ValueError as `read_metrics`."""
    events = read_metrics(run / EVENTS_FILE) if (run / EVENTS_FILE).exists() else []
    steps = [int(event["step"]) for event in events if event.get("kind") != RESUMED]
    return steps[-1] if steps else None


def truncate_after(path: Path, step: int, *, evaluates_again: bool = False) -> None:
    """Drop the records of steps after `step` and an unfinished last line, atomically; with `evaluates_again` also an
    evaluation at `step`. ValueError as `read_metrics`.
    """
    records = [record for record in read_metrics(path) if record.get("step", 0) <= step]
    if evaluates_again:
        records = [record for record in records if record.get("step") != step or "nelbo" not in record]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


class MetricsWriter:
    """Appends records to `run_dir/metrics.jsonl` and logs them to Weights & Biases; for one process of a run.

    after_step: the step that training goes on from; what an earlier attempt recorded after it is dropped, since those
    steps are taken again; evaluates_again: and so is an evaluation at that step. name and config: what Weights & Biases
    shows; the run's id is kept in `run_dir/wandb_id`, so that a resumed run stays one. Offline, the choice of "auto"
    without a key, it writes to `run_dir/wandb` for `wandb sync`. If either fails, it warns once and the run goes on.

    OSError: the file cannot be written. ValueError: a spoilt metrics file, see `read_metrics`.
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
        if path.exists():
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

    def write(self, step: int, **values: Value) -> None:
        """One record. A number that is not finite becomes null, which JSON can say."""
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

    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        write_atomically(id_file, secrets.token_hex(8))
    run = wandb.init(
        mode=mode,
        project=recipe.project,
        entity=recipe.entity,
        name=name,
        id=id_file.read_text(),
        resume="allow" if mode == "online" else None,
        dir=run_dir,
        config=dict(config),
        # The console is the progress bar's, and a dead network must not hold a finished job.
        settings=wandb.Settings(console="off", quiet=True, silent=mode == "offline", finish_timeout=60),
    )
    # wandb's own counter refuses to go back, as it must where a resumed run takes steps again.
    run.define_metric("*", step_metric="step")
    return run


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
