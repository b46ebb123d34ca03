"""Check which of the attention's two backward passes a recipe takes, and that a run says so."""

from __future__ import annotations

import os
import shutil
import types
from contextlib import ExitStack
from pathlib import Path

import torch

from bd3_scale.attention import cpu
from bd3_scale.attention.backends import KernelBackend
from bd3_scale.recipe.load import load_recipe
from bd3_scale.registry import attention_backends
from bd3_scale.resilience.heartbeat import Heartbeat
from bd3_scale.train.report import Report
from bd3_scale.train.setup import open_run
from tests.attention.cases import Problem, outputs_and_gradients
from tests.support.forks import run_ranks
from tests.support.recipes import write_recipe

asked: list[bool] = []


def backward(*arguments):
    asked.append(arguments[-1])
    return cpu.backward(*arguments)


@attention_backends.register("test_asked")
class Asked(KernelBackend):
    """The kernels for CPU, which record whether the deterministic pass was requested."""

    name = "test_asked"

    def kernels(self):
        return types.SimpleNamespace(forward=cpu.forward, backward=backward, decode=cpu.decode)


def test_a_recipe_chooses_the_pass(tmp_path: Path, topics: Path) -> None:
    shutil.copytree(topics, tmp_path / "data")
    recipe = write_recipe(
        tmp_path / "recipe.yaml", data={"path": str(tmp_path / "data")}, run_dir=str(tmp_path / "run")
    )
    run_ranks(differentiate, 1, recipe, logs=tmp_path / "logs")
    said = " ".join((tmp_path / "logs/rank0.log").read_text().split())
    assert "attention: triton, deterministic backward of seven products; optimizer: one" in said
    fused = "attention: triton, fused backward of five products, whose sums differ from run to run"
    assert f"{fused}; between products: plain PyTorch; optimizer: one" in said


def differentiate(path: Path) -> None:
    for deterministic, between in ((True, ""), (False, "plain")):
        recipe = load_recipe(path).model_copy(update={"deterministic": deterministic})
        with ExitStack() as stack:
            run = open_run(recipe, stack, Heartbeat())
            outputs_and_gradients(Problem([[8]], [4], None, 1, True, True, 1, 1, 16, 0), torch.float32, "test_asked")
            assert asked.pop() is deterministic
            run.folder.mkdir(parents=True, exist_ok=True)
            os.environ["BD3_SCALE_FUSED"] = between
            with Report(run.folder, recipe, 0, attention_backend="triton", optimizer="one"):
                pass
