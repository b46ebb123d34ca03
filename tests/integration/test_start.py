"""Check starts that must fail, with real processes: every rank ends soon with the reason, and none waits."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import yaml

from bd3_scale.launch import local
from bd3_scale.recipe.schema import ParallelRecipe, Recipe
from tests.integration import cases
from tests.support import forks
from tests.support.forks import free_port, run_ranks
from tests.support.programs import BD3_SCALE
from tests.support.runs import wait_for

TP2 = cases.recipe(cases.LAYOUTS["tp2"])
ALONE = TP2.model_copy(update={"parallel": ParallelRecipe()})
OTHER_RATE = TP2.model_copy(update={"optimizer": TP2.optimizer.model_copy(update={"lr": 0.001})})

# The fork server runs it as a rank, which must be refused before groups are made.
REFUSED = """
import os
import pytest
from bd3_scale.parallel.groups import process_groups
from bd3_scale.recipe.load import recipe_hash
mine = recipes[int(os.environ["RANK"])]
with pytest.raises(ValueError) as refused, process_groups(mine.parallel, agree=recipe_hash(mine)):
    pass
assert str(refused.value) == message
"""

# The fork server runs it as a rank; rank 1 reaches a collective after the others' time limit.
LATE = """
import os, time
from datetime import timedelta
import torch
import torch.distributed as dist
from bd3_scale.parallel.groups import process_groups
from bd3_scale.recipe.schema import ParallelRecipe

if watched:
    os.environ["BD3_SCALE_HEARTBEATS"] = "somewhere"
with process_groups(ParallelRecipe(), timeout=timedelta(seconds=10)):
    dist.barrier()
    late = os.environ["RANK"] == "1"
    time.sleep(14 * late)
    try:
        dist.all_reduce(torch.ones(1))
        waited = True
    except RuntimeError:
        waited = False
assert late or waited == watched
"""

# Rank 0 starts as always; rank 1 dies when rank 0 is in the rendezvous.
DYING = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path

def raises():
    while not Path(os.environ["BD3_SCALE_RENDEZVOUS"], "ranks").exists():
        time.sleep(0.05)
    died.touch()
    raise RuntimeError("the accelerator of this rank is gone")

def is_killed():
    from bd3_scale.parallel.rendezvous import find_ranks
    find_ranks(None, timedelta(seconds=60))  # returns when both have joined it
    died.touch()
    os.kill(os.getpid(), signal.SIGKILL)

recipe, died = map(Path, sys.argv[2:])
if os.environ["RANK"] == "1":
    globals()[sys.argv[1]]()
from bd3_scale.recipe.load import load_recipe
from bd3_scale.train.main import main
main(load_recipe(recipe, []))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    values = TP2.model_dump(mode="json", exclude_unset=True)
    path.write_text(yaml.safe_dump(values | {"run_dir": str(tmp_path / "run")}))
    return path


def other_recipe(ranks: list[int]) -> str:
    return f"ranks {ranks} were started with another recipe than rank 0: give all ranks the same file and overrides"


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ([TP2, TP2, OTHER_RATE], other_recipe([2])),
        ([TP2, ALONE, ALONE], other_recipe([1, 2])),
        (
            [TP2] * 3,
            "3 processes cannot be split by parallel.tensor=2 x pipeline=1 x context=1: start a multiple of 2",
        ),
    ],
    ids=["another learning rate", "another layout", "three for two"],
)
def test_ranks_that_do_not_fit_together_all_say_so(recipes: list[Recipe], message: str, tmp_path: Path) -> None:
    run_ranks(exec, 3, REFUSED, {"recipes": recipes, "message": message}, logs=tmp_path)


@pytest.mark.parametrize("watched", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_collective_waits_for_a_late_rank_where_somebody_else_tells_a_hang(watched: bool, tmp_path: Path) -> None:
    run_ranks(exec, 2, LATE, {"watched": watched}, logs=tmp_path)


def test_ranks_started_by_hand_with_other_overrides_end_with_one_line(recipe: Path, tmp_path: Path) -> None:
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        forks.Program(
            [sys.executable, "-m", "bd3_scale.train", recipe, *overrides],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, overrides in enumerate([[], ["optimizer.lr=0.001"]])
    ]
    try:
        for rank in ranks:
            stdout, stderr = rank.communicate(timeout=60)
            assert (rank.returncode, stdout) == (2, "")
            assert re.fullmatch(rf"\S+ \S+ \[rank \d\] error: {re.escape(other_recipe([1]))}\n", stderr), stderr
    finally:
        for rank in ranks:
            rank.end()
    assert sorted(os.listdir(tmp_path / "run")) == [".secret", "logs"]


@pytest.mark.parametrize(
    ("death", "code", "words"),
    [
        ("raises", 1, ["exit code 1", "Traceback", "in raises", "RuntimeError: the accelerator of this rank is gone"]),
        ("is_killed", 137, ["was killed by SIGKILL"]),
    ],
)
def test_a_rank_that_dies_does_not_leave_the_others_in_the_rendezvous(
    death: str,
    code: int,
    words: list[str],
    recipe: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check also ranks that ignore SIGTERM, as waiting C++ code does: they end after the launcher's grace period."""
    monkeypatch.setattr(local, "GRACE_SECONDS", 1.0)
    died = tmp_path / "died"
    assert local.launch([sys.executable, "-c", DYING, death, recipe, died], 2, 1, tmp_path / "logs") == code
    assert time.time() - died.stat().st_mtime < local.GRACE_SECONDS + 5
    said = capfd.readouterr().err
    assert all(word in said for word in ["rank 1", *words]), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_that_waits_for_others_ends_at_a_signal(number: signal.Signals, recipe: Path, tmp_path: Path) -> None:
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    rank = forks.Program(
        [sys.executable, "-m", "bd3_scale.train", recipe], env=os.environ | common | {"RANK": "0", "LOCAL_RANK": "0"}
    )
    try:
        wait_for(lambda: _listens(int(common["MASTER_PORT"])))
        rank.send_signal(number)
        assert rank.wait(timeout=10) == -number
    finally:
        rank.end()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_processes_that_the_layout_does_not_divide_are_not_started(recipe: Path, tmp_path: Path) -> None:
    done = forks.run([BD3_SCALE, "train", recipe, "launch.processes=3"])
    assert done.returncode == 2
    assert "3 processes do not divide into parallel.tensor=2: start 2 or 4 processes" in done.stderr
    assert not (tmp_path / "run").exists()
