"""Check that every command shows names and texts of others with escapes for what a terminal would obey."""

from __future__ import annotations

import json
import os
import pty
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bd3_scale.launch.submit import SLURM_FOLDER
from tests.support import forks
from tests.support.programs import BD3_SCALE

FIXTURE = Path(__file__).parents[1] / "fixtures/format-3"
# It closes a style that rich never opened, sets the terminal's title, reverses the rest, and has an emoji's code.
NAME = "a[/b]c\x1b]0;title\x07\u202e:smile:"
SHOWN = r"a[/b]c\x1b]0;title\x07\u202e:smile:"
ENVIRONMENT = os.environ | {"COLUMNS": "400"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder in which a folder with a hostile name holds prepared data and a run."""
    folder = tmp_path_factory.mktemp("strangers")
    shutil.copytree(FIXTURE, folder / NAME)
    return folder


def shown(place: Path, *arguments: object, returncode: int = 0) -> str:
    """Run a command and return its output, which must be safe for a terminal."""
    done = forks.run([BD3_SCALE, *arguments], cwd=place, env=ENVIRONMENT)
    assert done.returncode == returncode, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert not set(said) & {"\x1b", "\x07", "\u202e", "😄"}, said
    assert "Traceback" not in said
    return said


def test_data_and_tokenisers(place: Path) -> None:
    text = f"{NAME}/text/words.txt"
    (place / text).parent.mkdir()
    (place / text).write_text("a few words of text " * 300)
    tokenizer = shown(place, "data", "tokenizer", text, "--out", f"{NAME}/tok", "--vocab-size", 270)
    assert SHOWN in tokenizer
    arguments = ["data", "prepare", text, "--tokenizer", f"{NAME}/tok", "--seq-len", 64, "--workers", 1, "--holdout", 0]
    assert f"{SHOWN}/shards, 64 tokens" in shown(place, *arguments, "--out", f"{NAME}/shards")
    as_json = forks.bd3_scale(*arguments, "--out", f"{NAME}/shards2", "--json", cwd=place)
    assert any(NAME in source["path"] for source in json.loads(as_json)["sources"])
    # The file is left out of the data, and a log record says so.
    (place / f"{NAME}/text/.hidden\x1b[2J.txt").write_text("hidden")
    arguments[2] = f"{NAME}/text"
    assert r"left out (.hidden\x1b[2J.txt)" in shown(place, *arguments, "--out", "elsewhere")


def test_checkpoints_and_conversions(place: Path) -> None:
    run = f"{NAME}/run"
    assert f"{SHOWN}/run" in shown(place, "checkpoint", "list", run)
    shown(place, "checkpoint", "verify", run)
    assert f"{SHOWN}/run/checkpoints" in shown(place, "convert", "inspect", run)
    assert f"wrote and verified {SHOWN}/out" in shown(place, "convert", "export", run, "--out", f"{NAME}/out")
    options = ["--tokenizer", f"{NAME}/out", "--out", f"{NAME}/back"]
    assert f"wrote and verified {SHOWN}/back" in shown(place, "convert", "import", f"{NAME}/out", *options)
    options = ["--data", f"{NAME}/data", "--out", f"{NAME}/int8", "--bits", 8, "--group-size", 16, "--dry-run"]
    # The table's title is wrapped to the width of the table.
    assert SHOWN in shown(place, "convert", "quantize", run, *options)
    damaged = place / NAME / "damaged/checkpoints/step-00000003"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text(json.dumps({NAME: 1}))
    assert "step-00000003" in shown(place, "checkpoint", "list", f"{NAME}/damaged")
    shown(place, "checkpoint", "verify", f"{NAME}/damaged", returncode=1)


def test_a_stranger_s_tensors(place: Path) -> None:
    folder = place / "model"
    folder.mkdir()
    save_file({f"model.{NAME}.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": [NAME]}))
    said = shown(place, "convert", "inspect", folder)
    assert f"{SHOWN}, which cannot be imported" in said
    assert said.count(SHOWN) == 2


def test_measures_and_a_run_s_state(place: Path) -> None:
    run, data = f"{NAME}/run", ["--data", f"{NAME}/data"]
    assert f"{SHOWN}/run" in shown(place, "evaluate", run, *data, "--sequences", 2, "--draws", 1)
    (place / "[/b]\x1b[2J.txt").parent.mkdir()
    (place / "[/b]\x1b[2J.txt").write_text("a few words of text " * 20)
    said = shown(place, "evaluate", run, "--text", "[/b]\x1b[2J.txt", "--sequences", 2, "--draws", 1)
    assert said.count(r"b]\x1b[2J") == 3
    folder = place / run / SLURM_FOLDER
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({"steps": 8, "submission": "1"}))
    attempt = {"attempt": 0, "started": 0, "ended": 9, "from_step": 0, "step": 4, "saved": 4, "outcome": "failed"}
    told = {"submission": "1", "reason": f"rank 0: {NAME}", "job_id": "1", "nodes": [NAME]}
    (folder / "attempts.jsonl").write_text(json.dumps(attempt | told) + "\n")
    assert shown(place, "status", run).count(SHOWN) == 4


def test_errors(place: Path) -> None:
    for command in ("train", "evaluate", "generate"):
        said = shown(place, command, f"{NAME}/gone", returncode=2)
        assert said.startswith("error: ")
        assert SHOWN in said


def on_a_terminal(command: list[object], cwd: Path) -> str:
    """Return what a terminal receives from a command that writes to it."""
    outer, inner = pty.openpty()
    script = (
        "import os, subprocess, sys\n"
        f"terminal = os.open({os.ttyname(inner)!r}, os.O_RDWR | os.O_NOCTTY)\n"
        "sys.exit(subprocess.run(sys.argv[1:], stdout=terminal).returncode)"
    )
    done = forks.run([sys.executable, "-c", script, *command], cwd=cwd, env=ENVIRONMENT | {"TERM": "xterm"})
    assert done.returncode == 0, done.stderr
    time.sleep(0.1)
    os.close(inner)
    sent = b""
    while True:
        try:
            sent += os.read(outer, 1 << 16)
        except OSError:  # all of it is read
            os.close(outer)
            return sent.decode().replace("\r\n", "\n")


def test_a_text_that_was_generated_is_cleaned_for_a_terminal_and_as_it_is_in_a_file(place: Path) -> None:
    prompt = "\x1b]0;title\x07\x9b31m\x0c" + 100 * "word " + "[bold]"
    command = [BD3_SCALE, "generate", f"{NAME}/run", "--prompt", prompt, "--max-new-tokens", 1]
    piped = forks.run(command, cwd=place)
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.startswith(prompt)
    sent = on_a_terminal(command, place)
    assert r"\x1b]0;title\x07\x9b31m\x0cword word" in sent
    assert not set(sent) & {"\x07", "\x9b"}
    # Our own escapes for bold remain, and none of the text's.
    assert "\x1b]" not in sent

    log = place / NAME / "run/logs/attempt-0"
    log.mkdir(parents=True)
    (log / "rank0.log").write_text(f"{NAME}\n")
    command = [BD3_SCALE, "logs", f"{NAME}/run"]
    assert forks.run(command, cwd=place).stdout == f"{NAME}\n"
    assert on_a_terminal(command, place) == f"{SHOWN}\n"
