from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bd3_scale.cli import app, checkpoint_app, convert_app, data_app
from bd3_scale.data.commands_inspect import app as looking_app
from bd3_scale.project.commands import recipe_app

pytestmark = pytest.mark.launch

COMMAND = Path(sys.executable).with_name("bd3-scale")
COMMANDS = [
    [*group, command.name or command.callback.__name__]
    for group, typer_app in (
        ([], app),
        (["data"], data_app),
        (["data"], looking_app),
        (["convert"], convert_app),
        (["checkpoint"], checkpoint_app),
        (["recipe"], recipe_app),
    )
    for command in typer_app.registered_commands
    if command.callback is not None
]
RECIPE = """
name: r
model: {num_layers: 1, hidden_size: 16, num_attention_heads: 2, ffn_hidden_size: 16}
diffusion: {block_size: 8}
data: {path: nowhere, seq_len: 64}
train: {steps: 1, global_batch_size: 2, micro_batch_size: 1}
launch: {processes: 1}
"""


def bd3_scale(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "120"} | environment,
        check=False,
    )


@pytest.mark.alone
def test_help_answers_in_half_a_second() -> None:
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        assert bd3_scale("--help").returncode == 0
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_with_an_example_of_its_own(command: list[str]) -> None:
    done = bd3_scale(*command, "--help")
    assert done.returncode == 0
    assert f"Example: bd3-scale {' '.join(command)} " in done.stdout


@pytest.mark.parametrize(
    "command", [["train", "recipe.yaml"], ["checkpoint", "list", "run"], ["checkpoint", "verify", "run"]]
)
def test_who_launches_or_looks_does_not_wait_for_torch(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "run/checkpoints/step-00000007").mkdir(parents=True)
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch is imported')")
    done = bd3_scale(*command, cwd=tmp_path, PYTHONPATH=str(tmp_path), BD3_DEBUG="1")
    assert "torch is imported" not in done.stderr
    assert "nowhere" in done.stderr or "step-00000007" in done.stdout


def test_text_becomes_shards_that_the_commands_describe(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        text = " ".join(f"the {word} of document {i}" for word in ("shape", "colour", "weight", "age")) * (1 + i % 3)
        (tmp_path / f"corpus/{i}.txt").write_text(text)
    done = bd3_scale("data", "tokenizer", "corpus", "--out", "tok", "--vocab-size", 300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tok: 301 ids with the mask" in done.stdout
    arguments = ["data", "prepare", "corpus", "--tokenizer", "tok", "--seq-len", 64, "--holdout", 0.2, "--workers", 1]
    done = bd3_scale(*arguments, "--out", "shards", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest == json.loads((tmp_path / "shards/manifest.json").read_text())
    assert manifest["seq_len"] == 64
    assert manifest["vocabulary"]["size"] == 301
    table = bd3_scale(*arguments, "--out", "again", cwd=tmp_path)
    assert f"{manifest['train']['sequences'] * 64:,}" in table.stdout


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = bd3_scale("data", "tokenizer", tmp_path / "[bold]gone[/]", "--out", tmp_path / "tok")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "[bold]gone[/]" in done.stderr


def test_the_traceback_is_there_for_who_asks(tmp_path: Path) -> None:
    done = bd3_scale("data", "tokenizer", tmp_path / "gone", "--out", tmp_path / "tok", BD3_DEBUG="1")
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.global_batch_size=3", "launch.processes=2"], "train.global_batch_size=3"),
        (["optimizer.lrr=1"], "did you mean optimizer.lr?"),
        (["parallel.tensor=2"], "1 processes do not divide into parallel.tensor=2"),
        ([], "nowhere"),
    ],
)
def test_training_refuses_a_bad_recipe_or_no_data_before_any_process_starts(
    tmp_path: Path, overrides: list[str], words: str
) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = bd3_scale("train", "r.yaml", *overrides, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_a_process_of_a_launched_run_checks_against_the_world_it_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = bd3_scale("train", "r.yaml", cwd=tmp_path, RANK="0", WORLD_SIZE="4")
    assert done.returncode == 2
    assert "4 data-parallel ranks" in done.stderr


def test_threads_are_the_recipe_s_or_the_environment_s_or_a_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("a few words of text " * 100)
    data = ["data", "prepare", "text.txt", "--tokenizer", "bytes", "--seq-len", 64, "--workers", 1, "--holdout", 0]
    assert bd3_scale(*data, "--out", "shards", cwd=tmp_path).returncode == 0
    (tmp_path / "r.yaml").write_text(RECIPE)
    started: list[int] = []
    monkeypatch.setattr(
        "bd3_scale.launch.local.launch", lambda argv, ranks, threads, *rest, **more: started.append(threads)
    )
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.chdir(tmp_path)

    def threads(*overrides: str, **environment: str) -> int:
        with monkeypatch.context() as patch:
            patch.delenv("OMP_NUM_THREADS", raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            assert CliRunner().invoke(app, ["train", "r.yaml", "data.path=shards", *overrides]).exit_code == 0
        return started[-1]

    two = "launch.processes=2"
    assert threads() == 8
    assert threads(two) == 4
    assert threads(two, OMP_NUM_THREADS="3") == 3
    assert threads(two, OMP_NUM_THREADS="1,2") == 4
    assert threads(two, "launch.threads=2", OMP_NUM_THREADS="3") == 2


def test_doctor_reports_what_is_installed() -> None:
    done = bd3_scale("doctor", "--json")
    report = json.loads(done.stdout)
    assert report["versions"]["python"] == sys.version.split()[0]
    assert report["versions"]["deepspeed"]
    assert {a["name"] for a in report["accelerations"]} == {"bf16", "NVIDIA apex", "Triton"}
    table = bd3_scale("doctor").stdout
    for name in ("megatron-core", "CPU", "GPU", "NVIDIA apex", "Triton"):
        assert name in table
