"""Test the supervisor as a site's own Python starts it: by its path, without an installed package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_scale.launch import supervise


@pytest.mark.launch
def test_it_runs_where_bd3_scale_is_not_installed(tmp_path: Path) -> None:
    """Run its smallest task, which removes this node's cache."""
    cache = tmp_path / "cache-7-n1"
    (cache / "shards").mkdir(parents=True)
    (tmp_path / "cache-8-n1").mkdir()
    (tmp_path / "job.json").write_text(json.dumps({"cache": str(tmp_path / "cache")}))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    bare = [sys.executable, "-S"]  # without site-packages
    absent = subprocess.run([*bare, "-c", "import bd3_scale"], cwd=tmp_path, env=environment, capture_output=True)
    assert absent.returncode == 1
    done = subprocess.run(
        [*bare, supervise.__file__, "clean", str(tmp_path / "job.json")],
        cwd=tmp_path,
        env=environment | {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in sorted(tmp_path.glob("cache-*"))] == ["cache-8-n1"]
