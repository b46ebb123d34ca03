"""Test that a save killed at any system call leaves sound checkpoints, and that any damage to one is found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_scale.checkpoint.folder import list_checkpoints
from bd3_scale.checkpoint.newest import newest_sound
from bd3_scale.checkpoint.verify import check_checkpoint
from tests.faults.saving import save, sealed

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """Compile the library that injects the failures."""
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim.c", "-ldl"], check=True)
    return library


@pytest.mark.parametrize("kind", ["kill", "full", "fail"])
def test_struck_at_every_system_call(shim, kind, tmp_path):
    environment = os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "saving.py"), str(tmp_path), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) > 30, "folders, seven files, their flushes, renames and removals"
    assert outcomes[-1]["status"] == 0
    assert outcomes[-1]["sound"] == [2]
    for outcome in outcomes[:-1]:
        if kind == "kill":
            assert outcome["status"] == signal.SIGKILL, outcome
        else:
            assert os.waitstatus_to_exitcode(outcome["status"]) in (0, 2), outcome
        assert outcome["sound"], outcome
        assert set(outcome["sound"]) <= {1, 2}, outcome
        assert outcome["latest"] in outcome["sound"], outcome
        assert outcome["left"] == [], outcome
    assert {tuple(outcome["sound"]) for outcome in outcomes} >= {(1,), (1, 2), (2,)}


@pytest.fixture
def two(tmp_path, groups):
    """Make two checkpoints of a run."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return [_kept(folder, step) for step in (1, 2)]


def _kept(folder, step):
    # `save` keeps the last one alone.
    aside = folder.parent / f"aside-{step}" / "checkpoints"
    aside.mkdir(parents=True)
    return Path(shutil.move(save(aside, step), folder / f"step-{step:08d}"))


def files(checkpoint):
    return sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())


def test_every_damage_to_every_file_is_found(two):
    """Check it for files changed at the beginning, the end and between, cut, emptied, deleted, or of another step."""
    older, newer = two
    assert {str(name) for name in files(newer)} >= {"manifest.json", "index.json", "tokenizer/tokenizer.json"}
    found = tried = 0
    for name in files(newer):
        whole = (newer / name).read_bytes()
        places = range(len(whole)) if len(whole) < 4000 else range(0, len(whole), 97)
        damaged = [whole[:p] + bytes([whole[p] ^ 1 << p % 8]) + whole[p + 1 :] for p in places]
        damaged += [whole[: len(whole) // 2], b"", None]
        other = (older / name).read_bytes()
        damaged += [other] if other != whole else []
        for content in damaged:
            if content is None:
                (newer / name).unlink()
            else:
                (newer / name).write_bytes(content)
            tried += 1
            found += _damage(newer) is not None
            (newer / name).write_bytes(whole)
    assert tried > 500
    assert found == tried
    assert check_checkpoint(newer, "full").step == 2


def test_a_checkpoint_under_another_step_s_name_is_none(two):
    _, newer = two
    renamed = newer.rename(newer.with_name("step-00000003"))
    assert "its manifest says step 2" in _damage(renamed)


def _damage(checkpoint):
    """Return what a full check says of it."""
    try:
        check_checkpoint(checkpoint, "full")
    except ValueError as error:
        return str(error)
    return None


def test_a_damaged_checkpoint_steps_back_and_is_moved_aside(two, caplog):
    older, newer = two
    tensors = next(newer.glob("*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    assert check_checkpoint(newer, "fast").step == 2, "of the same size"
    folder, manifest = newest_sound(older.parent, "full")
    assert (folder, manifest.step) == (older, 1)
    assert f"{tensors.name} differs from what was written" in caplog.text
    assert "renamed to damaged-step-00000002" in caplog.text
    assert list_checkpoints(older.parent) == [older]
    assert (older.parent / "latest").read_text() == "step-00000001\n"
    (older / "manifest.json").unlink()
    for mode in ("fast", "full"):
        with pytest.raises(ValueError, match=r"none of the checkpoints .* is sound: .* it has no manifest.json"):
            newest_sound(older.parent, mode)
    assert list_checkpoints(older.parent) == [older], "nothing is moved where nothing is sound"


def test_what_cannot_be_read_is_not_taken_for_damage(two, monkeypatch):
    """Check that a checkpoint of another version, or on storage that fails at the moment, is kept."""
    older, newer = two
    for content, message in (
        ('{"format": 2, "step": 2}', "has format 2; this version reads formats 3 to 4"),
        (sealed(newer, model={"colour": "blue"}), "cannot be read by this version"),
    ):
        (newer / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            newest_sound(older.parent, "full")
        assert list_checkpoints(older.parent) == [older, newer]
    really_open = os.open

    def fails(path, *args, **kwargs):
        if Path(path).name == "manifest.json":
            raise OSError(5, "Input/output error")
        return really_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(ValueError, match=r"rank 0 cannot read a checkpoint: .* Input/output error"):
        newest_sound(older.parent, "full")
    assert list_checkpoints(older.parent) == [older, newer]
