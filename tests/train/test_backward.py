"""Which of the attention's two backward passes a recipe takes, and that a run says so."""

from __future__ import annotations

import os
import shutil
import types
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from bd3_scale.attention import cpu
from bd3_scale.attention.backends import KernelBackend
from bd3_scale.recipe.load import load_recipe
from bd3_scale.registry import attention_backends
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
    """The kernels for CPU, which note whether they were asked for the deterministic pass."""

    name = "test_asked"

    def kernels(self):
        return types.SimpleNamespace(forward=cpu.forward, backward=backward, decode=cpu.decode)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_recipe_chooses_the_pass(tmp_path: Path, topics: Path, deterministic: bool) -> None:
    shutil.copytree(topics, tmp_path / "data")
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        data={"path": str(tmp_path / "data")},
        deterministic=deterministic,
        run_dir=str(tmp_path / "run"),
    )
    run_ranks(differentiate, 1, recipe, deterministic, logs=tmp_path / "logs")
    said = (tmp_path / "logs/rank0.log").read_text()
    of_pass = {
        True: "attention: triton, deterministic backward of seven products; optimizer: one",
        False: "attention: triton, fused backward of five products, whose sums differ from run to run; "
        "between products: plain PyTorch; optimizer: one",
    }
    assert of_pass[deterministic] in " ".join(said.split())


def differentiate(path: Path, deterministic: bool) -> None:
    recipe = load_recipe(path)
    with ExitStack() as stack:
        run = open_run(recipe, stack)
        outputs_and_gradients(Problem([[8]], [4], None, 1, True, True, 1, 1, 16, 0), torch.float32, "test_asked")
        assert asked == [deterministic]
        run.folder.mkdir(parents=True)
        os.environ["BD3_SCALE_FUSED"] = "" if deterministic else "plain"
        with Report(run.folder, recipe, 0, attention_backend="triton", optimizer="one"):
            pass
