"""Collect what the files of a run hold for its report."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bd3_scale.observe.figures import run_series
from bd3_scale.observe.metrics import EVENTS_FILE, METRICS_FILE, RESUMED, SAMPLES_FILE, read_metrics
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.plain_yaml import parse_yaml
from bd3_scale.resilience.files import read_object
from bd3_scale.resilience.readers import in_one_line, open_regular, read_regular, reader
from bd3_scale.resilience.runlock import is_in_use
from bd3_scale.resilience.terminal import clean

# Of each start of training: RUN/attempts/NNNN/environment.json.
ATTEMPTS, ENVIRONMENT_FILE = "attempts", "environment.json"
# The page stays below 3 MB: the first and the last evaluations with samples, and so many letters of a text.
_MOST_SAMPLED_STEPS, _MOST_PROMPTS, _MOST_LETTERS = 40, 8, 4000
_MOST_EVENTS = 500
_RECENT = 20
# Seconds since the epoch in the year 5138: what a damaged file may hold beyond it is no date and no time.
LARGEST_SECONDS = 1e11


@dataclass(frozen=True)
class RunRecords:
    """The records of a run. recipe: by dotted key; starts: the `environment.json` of each start of training.

    notes: what is missing or damaged, for people.
    """

    folder: Path
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    notes: list[str]
    in_use: bool

    @property
    def name(self) -> str:
        """Return the recipe's name, or the folder's where the recipe cannot be read."""
        return str(self.recipe.get("name") or self.folder.name)

    @property
    def num_steps(self) -> int | None:
        """Return the steps that the recipe asks for, or None where it cannot be read."""
        steps = self.recipe.get("train.steps")
        return steps if type(steps) is int and 0 <= steps < 1 << 63 else None

    @property
    def step(self) -> int:
        """Return the last step that was recorded, 0 before the first."""
        return max((record["step"] for record in self.metrics), default=0)

    def last(self, metric: str) -> float | None:
        """Return the newest finite value of a metric, or None where there is none."""
        return last_value(self.metrics, metric)


@reader("a run", path="folder")
def read_run(folder: Path) -> RunRecords:
    """Return the records of a run directory, of this version or an earlier one.

    ValueError: it is no run directory. What is missing or damaged in one is left out, with a note.
    """
    notes: list[str] = []
    recipe = read_recipe(folder, notes)
    metrics = _records(folder / METRICS_FILE, notes)
    samples = _records(folder / SAMPLES_FILE, notes)
    starts = _starts(folder / ATTEMPTS, notes)
    if not metrics:
        notes.append("No step is recorded yet.")
    elif not any(record.get("eval/nelbo") is not None for record in metrics):
        notes.append("No evaluation is recorded: evaluation.every_steps says when there is one.")
    if not starts:
        notes.append("The machine and the versions are not recorded: an earlier version started this run.")
    if not samples:
        way = (
            ""
            if recipe.get("evaluation.prompts")
            else ": evaluation.prompts lists texts to continue at each evaluation"
        )
        notes.append(f"No samples are recorded{way}.")
    events = _records(folder / EVENTS_FILE, notes)
    return RunRecords(folder, recipe, metrics, events, samples, starts, notes, is_in_use(folder))


def _records(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if path.name != METRICS_FILE and (note := why_unreadable(path)):
        notes.append(note)
        return []
    records = read_metrics(path)
    if path.is_file():
        data = read_regular(path, 1 << 31)
        if damaged := data.count(b"\n") - len(records):
            notes.append(f"{path.name}: {damaged} damaged line{'s' * (damaged > 1)} left out.")
        if data and not data.endswith(b"\n"):
            notes.append(f"{path.name}: the last line is unfinished and left out.")
    return records


def why_unreadable(path: Path) -> str | None:
    """Return a note for people where a file cannot be opened, such as a FIFO; None where it can or is missing."""
    try:
        open_regular(path).close()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return clean(f"{path.name} is left out: {in_one_line(error)}")
    return None


def _starts(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    starts = []
    for path in sorted(folder.glob(f"*/{ENVIRONMENT_FILE}")):
        try:
            starts.append(read_object(path))
        except (OSError, ValueError) as error:
            notes.append(clean(f"{ATTEMPTS}/{path.parent.name} cannot be read: {in_one_line(error)}"))
    return starts


def read_recipe(folder: Path, notes: list[str]) -> dict[str, Any]:
    """Return the recipe of a run by dotted key, with this version's defaults where it can be loaded.

    ValueError: `folder` is no run directory. A recipe that cannot be read becomes a note.
    """
    path = folder / "recipe.yaml"
    if not path.is_file() and not (folder / METRICS_FILE).is_file():
        raise ValueError(f"{folder} is no run directory: it has neither recipe.yaml nor {METRICS_FILE}")
    try:
        return flat(load_recipe(path).model_dump(mode="json"))
    except (OSError, ValueError) as error:
        reason = in_one_line(error)
    try:
        plain = parse_yaml(read_regular(path).decode())
    except (OSError, ValueError):
        plain = None
    without = "" if isinstance(plain, dict) else "; the report goes without it"
    notes.append(clean(f"recipe.yaml is no recipe of this version{without}: {reason}"))
    return flat(plain) if isinstance(plain, dict) else {}


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted key."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def differences(recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the keys whose values differ between recipes, with the value of each as text; `–` where it has none."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    shown = [(key, [as_text(recipe[key]) if key in recipe else "–" for recipe in recipes]) for key in keys]
    return [(clean(key), texts) for key, texts in shown if len(set(texts)) > 1]


def as_text(value: Any) -> str:
    """Return a value of a recipe as a person writes it."""
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def last_value(records: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """Return the newest finite value of a metric, or None where there is none."""
    return next((record[metric] for record in reversed(records) if record.get(metric) is not None), None)


def step_seconds(records: Sequence[Mapping[str, Any]], steps: int) -> list[tuple[int, float]]:
    """Return the number of steps and the seconds of each, from step 1 to the last logged one up to `steps`.

    A step between two logged ones counts as the later one. The list has an entry a record, not a step, since a damaged
    line may hold a step of any size.
    """
    spans: list[tuple[int, float]] = []
    before, tokens_before = 0, 0
    for record in records:
        step, tokens, rate = record["step"], record.get("train/tokens"), record.get("perf/tokens_per_second")
        if not rate or tokens is None or not before < step <= steps:
            continue
        each = (tokens - tokens_before) / (step - before) / rate
        spans.append((step - before, each))
        before, tokens_before = step, tokens
    return spans


def total_seconds(spans: Sequence[tuple[int, float]], steps: int) -> float | None:
    """Return the seconds of the first `steps` steps of `step_seconds`; None where there are none, or it overflows."""
    total, left = 0.0, steps
    for number, seconds in spans:
        total += min(number, left) * seconds
        left -= min(number, left)
    return finite(total) or None


def remaining_seconds(spans: Sequence[tuple[int, float]], steps: int) -> float | None:
    """Return the time of `steps` more steps at the median pace of the last ones of `step_seconds`.

    The median: one step with an evaluation or a slow batch must not change the estimate. None where no pace is
    recorded, or where damaged lines give a time that is negative or that no date holds.
    """
    recent: list[float] = []
    for number, seconds in reversed(spans):
        recent += [seconds] * min(number, _RECENT - len(recent))
    left = median(recent) * steps if recent else -1.0
    return left if 0 <= left < LARGEST_SECONDS else None


def finite(number: float | None) -> float | None:
    """Return a derived number, or None where it has overflowed: the strict JSON of the page has no infinity."""
    return number if number is not None and math.isfinite(number) else None


def run_events(run: RunRecords) -> list[dict[str, str | int]]:
    """Return what stood out, the newest last: step, kind, what happened, and the command that computes it again."""
    events: list[dict[str, str | int]] = []
    for event in run.events[-_MOST_EVENTS:]:
        command = ""
        if event["kind"] != RESUMED:
            command = shlex.join(["bd3-scale", "replay", str(run.folder), "--step", str(event["step"])])
        kind = clean(event["kind"].replace("_", " "))
        events.append({"step": event["step"], "kind": kind, "text": _event_text(event), "command": clean(command)})
    return events


def _event_text(event: Mapping[str, Any]) -> str:
    if event["kind"] == RESUMED:
        changes = event.get("changes")
        pairs = changes.items() if isinstance(changes, dict) else ()
        texts = [
            f"{key}: {as_text(v.get('before'))} → {as_text(v.get('now'))}" for key, v in pairs if isinstance(v, dict)
        ]
        notes = event.get("notes")
        return clean("; ".join([*texts, *map(str, notes if isinstance(notes, list) else ())]))
    numbers = {key: event[key] for key in ("loss", "grad_norm", "median", "deviation") if key in event}
    return clean(", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in numbers.items()))


def _short(value: Any) -> str:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)[:80]
    return f"{number:.4g}" if math.isfinite(number) else str(number)


def samples_for_page(run: RunRecords) -> list[dict[str, Any]]:
    """Return by rising step the texts of an evaluation; of many evaluations evenly chosen ones, the last among them."""
    by_step: dict[int, list[dict[str, str]]] = {}
    for sample in run.samples:
        texts = {key: clean(str(sample.get(key, "")))[:_MOST_LETTERS] for key in ("prompt", "text")}
        by_step.setdefault(sample["step"], []).append(texts | {"nfe": as_text(sample.get("nfe"))})
    steps = sorted(by_step)
    stride = math.ceil(len(steps) / _MOST_SAMPLED_STEPS) or 1
    return [{"step": step, "texts": by_step[step][:_MOST_PROMPTS]} for step in steps[::-1][::stride][::-1]]


def saves_for_page(run: RunRecords) -> list[dict[str, Any]]:
    """Return each save: step, whether it failed, and its seconds, or None where they are not recorded."""
    saves = [record for record in run.metrics if "checkpoint/tries" in record]
    return [
        {"step": r["step"], "failed": bool(r.get("checkpoint/failed")), "seconds": r.get("checkpoint/seconds")}
        for r in saves
    ]


def state_of(run: RunRecords) -> str:
    """Return whether a run trains, is done or neither, by its lock and its records."""
    if run.in_use:
        return "training"
    if run.num_steps is not None and run.step >= run.num_steps:
        return "done"
    return "not running" if run.metrics else "not started"


def run_for_page(run: RunRecords) -> dict[str, Any]:
    """Return all of a run that its page shows of its own records, as JSON holds it; texts are clean of controls."""
    steps, tokens = run.step, run.last("train/tokens")
    logged = next((r["step"] for r in reversed(run.metrics) if r.get("train/tokens") is not None), 0)
    spans = step_seconds(run.metrics, steps)
    return {
        "name": clean(run.name),
        "folder": clean(str(run.folder)),
        "state": state_of(run),
        "step": steps,
        "steps": run.num_steps,
        "tokens_per_step": tokens / logged if tokens and logged else None,
        "loss": run.last("train/loss"),
        "nelbo": run.last("eval/nelbo"),
        "rate": run.last("perf/tokens_per_second"),
        "mfu": run.last("perf/mfu"),
        "seconds": total_seconds(spans, steps),
        "eta": remaining_seconds(spans, (run.num_steps or steps) - steps) if run.in_use else None,
        "series": run_series(run.metrics),
        "evaluations": [r["step"] for r in run.metrics if "eval/nelbo" in r],
        "saves": saves_for_page(run),
        "events": run_events(run),
        "samples": samples_for_page(run),
        "recipe": {clean(key): as_text(value) for key, value in run.recipe.items()},
        "notes": run.notes,
    }
