"""Check what a rank tells CUDA, which GPU it takes, and how it ends where others would wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bd3_scale.parallel import groups
from bd3_scale.parallel.groups import cuda_variables, is_left_open, local_device, process_groups
from bd3_scale.recipe.schema import ParallelRecipe, Recipe
from bd3_scale.train import main
from tests.support.forks import run_ranks
from tests.support.recipes import tiny_recipe

NAMES = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "NCCL_ALGO",
    "NCCL_NVLS_ENABLE",
)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_variables_are_those_that_the_layout_wants() -> None:
    grows = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert cuda_variables(ParallelRecipe(), deterministic=False) == grows
    one_queue = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert cuda_variables(ParallelRecipe(tensor=2), deterministic=False) == grows | one_queue
    assert cuda_variables(ParallelRecipe(), deterministic=True) == grows | {"NCCL_NVLS_ENABLE": "0"}


def test_what_a_person_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    monkeypatch.setenv("NCCL_ALGO", "NVLS")
    assert cuda_variables(ParallelRecipe(tensor=2), deterministic=True) == {}


@pytest.mark.parametrize(("rank", "visible", "expected"), [("3", 8, 3), ("3", 1, 0), ("5", 4, 1)])
def test_a_rank_takes_a_gpu_that_it_can_see(
    monkeypatch: pytest.MonkeyPatch, rank: str, visible: int, expected: int
) -> None:
    """Check sites that show each task of a node one GPU, which is number 0 for all tasks."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert local_device() == torch.device("cuda", expected)


@pytest.fixture
def as_with_nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let process groups end as those of GPUs do, while other ranks still run."""
    monkeypatch.setattr(groups, "_waits_for_others", lambda device: True)
    yield
    monkeypatch.undo()
    if dist.is_initialized():
        groups.parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def test_groups_end_with_success(as_with_nccl: None) -> None:
    with process_groups(ParallelRecipe()):
        assert dist.is_initialized()
    assert not dist.is_initialized()
    assert not is_left_open()


def test_after_an_error_nobody_waits_for_ranks_that_still_compute(as_with_nccl: None) -> None:
    with pytest.raises(FloatingPointError), process_groups(ParallelRecipe()):
        raise FloatingPointError("the loss is not finite")
    assert dist.is_initialized()
    assert is_left_open()


def test_groups_of_a_cpu_end_after_an_error_too() -> None:
    with pytest.raises(FloatingPointError), process_groups(ParallelRecipe()):
        raise FloatingPointError("the loss is not finite")
    assert not dist.is_initialized()


def fail_on_one_rank() -> None:
    def train(recipe: object, heartbeat: object) -> None:
        with process_groups(ParallelRecipe()):
            if dist.get_rank() == 1:
                # It stands for a thread of NCCL: an orderly end of the process would wait for it.
                threading.Thread(target=time.sleep, args=(60,)).start()
                raise ValueError("seed=x is no number")
            time.sleep(60)

    groups._waits_for_others = lambda device: True
    main.train = train
    main.main(Recipe.model_validate(tiny_recipe()))


def test_a_rank_that_fails_says_why_and_is_gone_while_others_compute(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 \(2\):\nerror: seed=x is no number") as told:
        run_ranks(fail_on_one_rank, 2, logs=tmp_path, timeout=50)
    assert "rank 0 (-9):" in str(told.value), "it computed until the test ended it"
