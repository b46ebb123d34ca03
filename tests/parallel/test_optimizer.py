"""Check which AdamW is used, what decays, and a family's properties; fake modules stand in for NVIDIA apex."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from bd3_scale.parallel.optimizer import AdamW
from bd3_scale.recipe.schema import OptimizerRecipe

APEX = """
class FusedAdam:
    def __init__(self, groups, **settings):
        self.groups, self.settings = groups, settings
"""
CHOOSE = """
import json, sys
from bd3_scale.recipe.schema import OptimizerRecipe
from bd3_scale.registry import optimizers
family = optimizers.get("adamw")(OptimizerRecipe(lr=0.5, betas=(0.7, 0.8), eps=0.25))
told = {"needs torch": "torch" in sys.modules}
from torch import nn
chosen = family.build([{"params": list(nn.Linear(3, 2).parameters()), "lr_scale": 3.0}], on_gpu=sys.argv[1] == "gpu")
told |= {"name": family.implementation(chosen), "module": type(chosen).__module__}
if told["module"] == "apex.optimizers":
    told["settings"], ((told["group"],)) = chosen.settings, [g["lr_scale"] for g in chosen.groups]
print(json.dumps(told))
"""


def choose(path, place):
    """Return what is chosen with the modules in `path`, in a new process, as imports cannot be undone."""
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE, place],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.launch
def test_apex_is_taken_where_the_states_are_on_a_gpu_and_there_alone(tmp_path):
    (tmp_path / "amp_C.py").touch()
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "optimizers.py").write_text(APEX)
    assert choose(tmp_path, "gpu") == {
        "needs torch": False,
        "name": "NVIDIA apex's FusedAdam",
        "module": "apex.optimizers",
        "settings": {"adam_w_mode": True, "lr": 0.5, "betas": [0.7, 0.8], "eps": 0.25},
        "group": 3.0,
    }
    assert choose(tmp_path, "cpu") == {"needs torch": False, "name": "torch's, fused", "module": "torch.optim.adamw"}


@pytest.mark.parametrize("on_gpu", [False, True])
def test_without_apex_it_is_torchs_fused_adamw(monkeypatch, on_gpu):
    monkeypatch.setitem(sys.modules, "amp_C", None)  # not to be imported, even where it is installed
    family = AdamW(OptimizerRecipe(lr=0.5, betas=(0.7, 0.8), eps=0.25))
    optimizer = family.build([{"params": list(nn.Linear(3, 2).parameters())}], on_gpu=on_gpu)
    assert type(optimizer) is torch.optim.AdamW
    assert family.implementation(optimizer) == "torch's, fused"
    assert [optimizer.defaults[name] for name in ("fused", "lr", "betas", "eps")] == [True, 0.5, (0.7, 0.8), 0.25]


def test_weight_decay_shrinks_matrices_apart_from_the_gradient(monkeypatch):
    """Check a step without a gradient: matrices shrink by lr · decay, unlike Adam with L2, and norms do not."""
    monkeypatch.setitem(sys.modules, "amp_C", None)
    matrix, norm = nn.Parameter(torch.full((2, 2), 4.0)), nn.Parameter(torch.full((2,), 4.0))
    groups = [{"params": [matrix], "weight_decay": 0.25}, {"params": [norm], "weight_decay": 0.0}]
    optimizer = AdamW(OptimizerRecipe(lr=0.5)).build(groups, on_gpu=False)
    matrix.grad, norm.grad = torch.zeros_like(matrix), torch.zeros_like(norm)
    optimizer.step()
    torch.testing.assert_close(matrix.data, torch.full((2, 2), 4.0 * (1 - 0.5 * 0.25)))
    torch.testing.assert_close(norm.data, torch.full((2,), 4.0))
