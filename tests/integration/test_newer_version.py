"""Run every command of docs/newer-version.md, in its order, on what an earlier version left."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess

import pytest

from tests.conftest import TESTS
from tests.support import forks
from tests.support.runs import losses, tensor_files

PAGE = TESTS.parent / "docs" / "newer-version.md"
_BLOCK = re.compile(r"^```sh\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def follow(commands, folder):
    """Run lines of a page one by one, and return what they print."""
    printed = ""
    for line in commands.splitlines():
        program, *words = shlex.split(line)
        if program == "bd3-scale":
            done = forks.run([forks.BD3_SCALE, *words], cwd=folder)
        else:
            done = subprocess.run([program, *words], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout + done.stderr
    return " ".join(printed.split())


def test_a_run_moves_to_this_version_and_back(tmp_path):
    folder = tmp_path / "format-3"
    shutil.copytree(TESTS / "fixtures" / "format-3", folder)
    expected = json.loads((folder / "expected.json").read_text())
    then = {int(step): pytest.approx(tuple(values), rel=1e-5) for step, values in expected["losses"].items()}
    run, before = folder / "run", tensor_files(folder / "run", 6)
    blocks = _BLOCK.findall(PAGE.read_text())
    assert [bool(said) for _, said in blocks] == [False, True, True, False]
    for commands, said in blocks:
        printed = follow(commands, folder)
        for line in said.splitlines():
            assert " ".join(line.split()) in printed
    # Two checkpoints exist, of three that would be kept; the first is the earlier version's, unchanged.
    assert sorted(path.name for path in (run / "newer").glob("step-*")) == ["step-00000006", "step-00000009"]
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000006"]
    assert tensor_files(run, 6) == before
    assert losses(run) == then
    # The earlier version takes those steps again.
    follow("bd3-scale train recipe.yaml", folder)
    assert losses(run) == then


def test_a_version_does_not_pass_over_a_checkpoint_of_a_later_format(tmp_path):
    """Check that the older version says which formats it reads, and does not resume from an earlier checkpoint."""
    folder = tmp_path / "format-3"
    shutil.copytree(TESTS / "fixtures" / "format-3", folder)
    later = folder / "run/checkpoints/step-00000007"
    shutil.copytree(folder / "run/checkpoints/step-00000006", later)
    manifest = json.loads((later / "manifest.json").read_text())
    # A later format may have another checksum, or none.
    del manifest["checksum"]
    (later / "manifest.json").write_text(json.dumps(manifest | {"format": 5, "step": 7}))
    metrics = (folder / "run/metrics.jsonl").read_bytes()
    told = forks.bd3_scale("train", "recipe.yaml", cwd=folder, returncode=2)
    assert "has format 5; this version reads formats 3 to 4" in " ".join(told.split())
    assert (folder / "run/metrics.jsonl").read_bytes() == metrics
