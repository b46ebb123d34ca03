"""The benchmark of a step runs where torch, megatron-core and DeepSpeed alone are, and says what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "data.seq_len=64"]
TINY += ["train.precision=fp32", "--steps", "1", "--warmup", "1", "--vocabulary", "384"]  # no id only pads it

# Everything else that bd3_scale depends on cannot be imported.
BARE = """
import sys
for name in ("yaml", "typer", "rich", "streaming", "wandb", "tokenizers", "transformers", "matplotlib", "zstandard"):
    sys.modules[name] = None
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def bench(*arguments: str, bare: bool = False, returncode: int = 0) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "tools/bench_step.py")
    start = [sys.executable, "-c", BARE, script] if bare else [sys.executable, script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == returncode, done.stdout + done.stderr
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
        # What ran is what is needed and the attention's scores a second time.
        assert 1.0 < row["flops_ran"] / row["flops_needed"] < 1.1
    assert bd3["flops_needed"] > ar["flops_needed"]
    assert found["shape"]["seq_len"] == 64
    assert {"hardware", "versions", "commit", "command", "processes", "threads"} <= found.keys()


def test_a_table_for_people_beside_the_rival() -> None:
    said = bench(*TINY, "--rival").stdout
    assert [line.split(" | ")[0] for line in said.splitlines() if line.startswith("| ")] == [
        "| objective",
        "| bd3",
        "| ar",
    ]
    assert "A block diffusion step takes" in said
    assert "The published model's step in plain PyTorch takes" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--steps", "0"], "at least 1"), (["--rival", "train.precision=bf16"], "--rival is for one process in fp32")],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], words: str) -> None:
    assert words in bench(*arguments, returncode=2).stderr
