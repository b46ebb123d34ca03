"""Record each attempt of a run: when, where and with what it was computed."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bd3_scale.observe.environment import cpu_flags, cpu_name, package_versions, source_commit
from bd3_scale.observe.report_data import ATTEMPTS, ENVIRONMENT_FILE
from bd3_scale.parallel.collective import gather_values, on_rank_zero
from bd3_scale.resilience.files import write_atomically
from bd3_scale.train.setup import Run

# The command of the launcher, for its ranks: they see their own command line alone.
COMMAND_VARIABLE = "BD3_SCALE_COMMAND"
# The variables that decide how a run computes and communicates, and which job it was.
_VARIABLES = re.compile(
    r"(BD3|NCCL|TORCH|PYTORCH|CUDA|CUBLAS|OMP|MKL|GLOO|TRITON)_\w+|SLURM_(JOB_ID|JOB_NODELIST|NNODES|NTASKS|RESTART_COUNT)"
    r"|(MASTER|LOCAL|WORLD)_\w+|WANDB_MODE"
)
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def record_attempt(run: Run, from_step: int) -> None:
    """Write `RUN/attempts/NNNN/environment.json` of this start; a number for each start, from 0000 on (collective).

    from_step: the steps that were finished before.
    """
    hosts = gather_values(socket.gethostname())
    on_rank_zero(lambda: _write(run, from_step, hosts))


def _write(run: Run, from_step: int, hosts: Sequence[str]) -> None:
    folder = run.folder / ATTEMPTS
    folder.mkdir(exist_ok=True)
    number = 1 + max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=-1)
    attempt = folder / f"{number:04}"
    attempt.mkdir()
    record = {"attempt": number, "from_step": from_step, **_environment(run, hosts)}
    write_atomically(attempt / ENVIRONMENT_FILE, json.dumps(record, indent=2) + "\n")


def _environment(run: Run, hosts: Sequence[str]) -> dict[str, Any]:
    parallel, commit = run.recipe.parallel, source_commit()
    layout = {key: getattr(parallel, key) for key in ("tensor", "pipeline", "context", "expert")}
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "command": os.environ.get(COMMAND_VARIABLE) or shlex.join([sys.executable, *sys.argv]),
        "folder": str(Path.cwd()),
        "hosts": list(hosts),
        "world_size": dist.get_world_size(),
        "layout": layout | {"data": run.groups.dp.size(), "zero_stage": parallel.zero_stage},
        "versions": package_versions(),
        "commit": None if commit == "unknown" else commit.removesuffix("+"),
        "clean": None if commit == "unknown" else not commit.endswith("+"),
        "cpu": cpu_name(),
        "cpu_flags": cpu_flags(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if _VARIABLES.fullmatch(name) and not _SECRET.search(name) and name != COMMAND_VARIABLE
        },
    }
