"""Check that a step's benchmark runs with only torch, megatron-core and DeepSpeed, and says what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bd3_scale.recipe.schema import Recipe
from tools import bench_step
from tools.plain_step import PlainStep

ROOT = Path(__file__).parents[2]
TINY = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "data.seq_len=64"]
TINY += ["train.precision=fp32", "--steps", "1", "--warmup", "1", "--vocabulary", "384"]  # no id is only padding

# No other dependency of bd3_scale can be imported.
BARE = """
import sys
for name in ("yaml", "typer", "rich", "streaming", "wandb", "tokenizers", "transformers", "matplotlib", "zstandard"):
    sys.modules[name] = None
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def bench(*arguments: str, bare: bool = False) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "tools/bench_step.py")
    start = [sys.executable, "-c", BARE, script] if bare else [sys.executable, script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_both_objectives_of_one_model_on_a_bare_host() -> None:
    found = json.loads(bench(*TINY, "--json", bare=True).stdout)
    bd3, ar = found["rows"]
    assert (bd3["objective"], ar["objective"]) == ("bd3", "ar")
    for row in (bd3, ar):
        assert row["seconds"].keys() == {"data", "forward", "backward", "optimizer", "step"}
        phases = sum(seconds for name, seconds in row["seconds"].items() if name != "step")
        assert phases == pytest.approx(row["seconds"]["step"], rel=0.1)
        assert row["tokens_per_second"] == pytest.approx(8 * 64 / row["seconds"]["step"])
        assert row["mfu"] is None, "a CPU's peak is not known"
        # The attention's scores are computed a second time; the rest is what is needed.
        assert 1.0 < row["flops_ran"] / row["flops_needed"] < 1.1
    assert bd3["flops_needed"] > ar["flops_needed"]
    assert found["shape"]["seq_len"] == 64
    assert {"hardware", "versions", "commit", "command", "processes", "threads"} <= found.keys()


@pytest.mark.slow
def test_tables_for_people_beside_the_rivals() -> None:
    shapes = ["--objective", "all", "--shapes", "64/16/8,32/8/2", "--precisions", "fp32,bf16"]
    said = bench(*TINY, *shapes, "--rival", "--dropout").stdout
    rivals = [f"plain {name}{how}" for name in ("bd3", "mdlm", "ar") for how in ("", ", dropout 0.1")]
    table = ["objective", "bd3", *rivals[:2], "mdlm", *rivals[2:4], "ar", *rivals[4:]]
    assert [line.split(" | ")[0][2:] for line in said.splitlines() if line.startswith("| ")] == 4 * table
    assert [line.partition("L=")[2][:16] for line in said.splitlines() if "L=" in line] == 2 * [
        "64, L'=16, batch",
        "32, L'=8, batch ",
    ]
    assert said.count("A block diffusion step takes") == 4


@pytest.mark.parametrize("objective", ["bd3", "mdlm", "ar"])
def test_a_rival_learns(objective: str) -> None:
    torch.manual_seed(0)
    model = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64}
    model |= {"activation": "gelu_tanh", "normalization": "layernorm", "qk_norm": False}
    recipe = Recipe.model_validate(
        {"name": "rival", "model": model, "diffusion": {"block_size": 4}, "data": {"path": "none", "seq_len": 16}}
        | {"train": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 2, "precision": "fp32"}}
    )
    rival = PlainStep(recipe, 11, 10, objective=objective, dropout=0.0)
    rival.optimizer.param_groups[0]["lr"] = 1e-2
    tokens, rate = torch.full((2, 16), 3), torch.full((2, 16), 0.5)
    losses = [rival.step(tokens, torch.rand(2, 16) < rate, rate) for _ in range(60)]
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "at least 1"),
        (["--rival", "model.qk_norm=true"], "the rival does not have model.qk_norm=True"),
        (["--shapes", "64/16"], "is not L/L'/batch"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        bench_step.main()
    assert words in capsys.readouterr().err
