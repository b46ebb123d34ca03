"""Write and read run records: what was measured, with which recipe, commit and machine.

The page is made from records alone.
"""

from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bd3_scale.observe.environment import read_environment

_ROOT = Path(__file__).parents[1]


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write a record with its commit, date, hardware and versions; the file appears complete or not at all."""
    here = read_environment()
    made = {
        "commit": _git("rev-parse", "--short=10", "HEAD"),
        # Only code that measures counts; the page and its records may have changes.
        "uncommitted": bool(_git("status", "--porcelain", "--", "bd3_scale", "tools", "recipes")),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": [here.cpu, f"{here.cpu_cores} cores", *(gpu.name for gpu in here.gpus)],
        "versions": {name: here.versions[name] for name in ("torch", "megatron-core", "transformers")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        json.dump(content | {"made": made}, file, separators=(",", ":"))
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_records(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the records of a folder by row and seed. ValueError: a file is not a record."""
    records = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            records[record["row"], record["seed"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a run record ({error!r}): remove it, and its row is run again") from error
    return records


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
