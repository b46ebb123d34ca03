"""Join the records of a run and its attempts to a report."""

from __future__ import annotations

import stat
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bd3_scale.launch.attempts import read_attempts
from bd3_scale.launch.job import SLURM_FOLDER
from bd3_scale.launch.records import read_json
from bd3_scale.observe.environment import software
from bd3_scale.observe.report_data import (
    LARGEST_SECONDS,
    RunRecords,
    differences,
    finite,
    read_run,
    run_for_page,
    step_seconds,
    total_seconds,
)
from bd3_scale.observe.report_page import PAGE_START, report_page
from bd3_scale.resilience.files import check_writable, write_atomically
from bd3_scale.resilience.readers import open_regular
from bd3_scale.resilience.terminal import clean

_TIME = "%Y-%m-%d %H:%M:%S UTC"


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write the report of one or several runs to `out`, atomically; a folder that is given twice is shown once.

    Raises:
        ValueError: a folder is no run directory, or `out` exists and is no page. OSError: `out` cannot be written.
    """
    _check_page(out)
    runs = [read_run(folder) for folder in {folder.resolve(): folder for folder in folders}.values()]
    check_writable(out.absolute().parent)
    shown = [run_for_page(run) | _attempts_of(run) for run in runs]
    for page, label in zip(shown, _labels(shown), strict=True):
        page["label"] = label
    made = time.strftime(_TIME, time.gmtime())
    recipes = differences([run.recipe for run in runs]) if len(runs) > 1 else []
    write_atomically(out, report_page(shown, made=made, version=software()["bd3_scale"], differences=recipes))


def _check_page(out: Path) -> None:
    """Check that `out` can be replaced by a report. ValueError: it exists, and is no page of a report."""
    try:
        mode = out.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISDIR(mode):
        raise ValueError(f"{out} is a folder: name the page in it, such as --out {out / 'report.html'}")
    if stat.S_ISLNK(mode):
        content = "a link"
    elif not stat.S_ISREG(mode):
        content = "a pipe, a device or a socket"
    else:
        with open_regular(out) as file:
            if file.read(len(PAGE_START)) == PAGE_START:
                return
        content = "a file that is no report"
    raise ValueError(f"{out} is {content}, and a report would replace it: name another file with --out")


def _labels(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what tells runs apart: their names, or where two have the same name their folders, or numbered folders."""
    names, folders = ([run[key] for run in runs] for key in ("name", "folder"))
    # Folders differ, but those with control characters in their names may look the same.
    numbered = [f"{folder} ({number})" for number, folder in enumerate(folders, 1)]
    return next(labels for labels in (names, folders, numbered) if len(set(labels)) == len(labels))


def _attempts_of(run: RunRecords) -> dict[str, Any]:
    """Return where a run was trained, its attempts, and the share of their time that took steps which still count.

    Only SLURM's attempts have an end that somebody wrote, so that other runs have no goodput.
    """
    folder = run.folder / SLURM_FOLDER
    ended, current = read_attempts(folder), read_json(folder / "current.json")
    wall = sum(_number(a, "ended") - _number(a, "started") for a in ended)
    # An attempt whose batch process died has no end, and no time that could be counted.
    wall += time.time() - _number(current, "started") if current and run.in_use else 0.0
    useful = total_seconds(step_seconds(run.metrics, run.step), run.step)
    lines = [*ended, *([current] if current else [])]
    attempts = [_slurm_attempt(line, run) for line in lines] if lines else _starts(run)
    where = _where(run.starts[-1]) if run.starts else (attempts[-1]["where"] if attempts else "not recorded")
    return {"attempts": attempts, "goodput": finite(useful / wall) if useful and wall > 0 else None, "where": where}


def _number(record: Mapping[str, Any], key: str) -> float:
    """Return a time or a step of a record; 0 where it holds none, or one that no date has."""
    value = record.get(key)
    return value if isinstance(value, (int, float)) and 0 <= value < LARGEST_SECONDS else 0.0


def _texts(record: Mapping[str, Any], key: str) -> list[str]:
    """Return a list of a record as texts; an empty one where it holds none."""
    value = record.get(key)
    return [str(each) for each in value] if isinstance(value, list) else []


def _slurm_attempt(line: Mapping[str, Any], run: RunRecords) -> dict[str, Any]:
    began, first = _number(line, "started"), int(_number(line, "from_step"))
    running = "it runs" if run.in_use else "its end is not recorded"
    return {
        "name": clean(f"attempt {line.get('attempt', '?')}, job {line.get('job_id', '?')}"),
        "began": datetime.fromtimestamp(began, UTC).strftime(_TIME),
        "from": first,
        "to": int(_number(line, "step")) if "ended" in line else max(run.step, first),
        "text": clean(f"{line['outcome']}: {line.get('reason', '')}" if "outcome" in line else running),
        "failure": bool(line.get("failure")),
        "where": clean(", ".join(_texts(line, "nodes")) or "–"),
        "software": "–",
        "command": "",
    }


def _starts(run: RunRecords) -> list[dict[str, Any]]:
    """Return the starts of a run without SLURM; each lasts to the step that the next one began from."""
    firsts = [int(_number(start, "from_step")) for start in run.starts]
    ends = [*firsts[1:], run.step][: len(firsts)]
    return [
        {
            "name": clean(f"attempt {start.get('attempt', number)}"),
            "began": clean(str(start.get("began", "–"))),
            "from": first,
            "to": max(first, end),
            "text": "" if number + 1 < len(run.starts) or not run.in_use else "it runs",
            "failure": False,
            "where": _where(start),
            "software": _software(start),
            "command": clean(str(start.get("command", ""))),
        }
        for number, (start, first, end) in enumerate(zip(run.starts, firsts, ends, strict=True))
    ]


def _where(start: Mapping[str, Any]) -> str:
    """Return the hosts and processors of a start of training in one line."""
    names, gpus = list(dict.fromkeys(_texts(start, "hosts"))), _texts(start, "gpus")
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    cpu = f"{start.get('cpu', 'CPU')}, {start.get('cpu_cores', '?')} cores"
    device = f"{len(gpus)} × {gpus[0]} a host" if gpus else cpu
    return clean(f"{start.get('world_size', '?')} ranks on {shown or 'one host'}: {device}")


def _software(start: Mapping[str, Any]) -> str:
    versions = start.get("versions")
    named = {key: value for key, value in versions.items() if value} if isinstance(versions, dict) else {}
    shown = [f"{key} {named[key]}" for key in ("bd3_scale", "torch", "python") if key in named]
    tree = ", with changed files" if start.get("clean") is False else ""
    return clean(", ".join([*shown, f"commit {start['commit']}{tree}"] if start.get("commit") else shown) or "–")
