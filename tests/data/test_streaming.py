from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from bd3_scale.data import shard_files
from bd3_scale.data.index import read_index
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.shards import Shards

pytestmark = pytest.mark.launch

HOLD = Path(__file__).with_name("hold_stream.py")


@contextmanager
def live_streams(count: int, *arguments: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Start processes together that read from one folder, each in its own session."""
    command = [sys.executable, HOLD, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, **pipes, text=True, start_new_session=True) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            kill_all(process)


def first_lines(process: subprocess.Popen[str]) -> tuple[str, Path]:
    """Return the first batch, and the folder of the shared memory."""
    assert process.stdout is not None
    return process.stdout.readline(), Path(process.stdout.readline().strip())


def read_on(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n" * count)
    process.stdin.flush()
    return [process.stdout.readline() for _ in range(count)]


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill a whole session, as a scheduler does: the rank, its loader workers and the resource tracker."""
    if process.poll() is None:
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        psutil.wait_procs(everyone, timeout=10)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set the temporary folder of all started processes."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.mark.slow
def test_two_runs_share_an_unread_folder_and_only_what_the_killed_one_left_is_removed(
    prepared: Path, tmp_path: Path, temporary: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data, ignore=shutil.ignore_patterns("*.mds"))
    with live_streams(2, data) as (living, killed):
        (batch, kept), (same_batch, left) = first_lines(living), first_lines(killed)
        assert batch == same_batch
        assert kept != left
        assert read_on(living, 30) == read_on(killed, 30)
        assert {"".join(file.suffixes) for file in (data / "train").glob("shard*")} >= {".00000.mds", ".00001.mds.zstd"}
        assert not [file for file in (data / "train").iterdir() if file.name.startswith(".")]
        kill_all(killed)
        assert {path.parent for path in (kept, left)} == {temporary}
        assert {"states", "usage"} <= {path.name for path in left.iterdir()}
        before = set(kept.iterdir())
        shards = Shards(str(data), None, None, "train", read_index(data / "train" / "index.json"))
        assert not left.exists()
        assert not Path(f"{left}.lock").exists()
        assert set(kept.iterdir()) == before
        assert shards[0]["tokens"].shape == (32,)
        assert len(set(read_on(living, 30))) == 30
        assert living.stdin is not None
        living.stdin.close()
        assert living.wait(30) == 0  # its loader worker does not keep it
        assert not kept.exists()  # it takes its own along


def test_what_a_killed_process_was_unpacking_is_removed_by_the_next(prepared: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data, ignore=shutil.ignore_patterns("*.mds"))
    left = data / "train" / ".unpacking.00000001"
    left.mkdir()
    (left / "shard").write_text("half")
    Path(f"{left}.lock").touch()
    assert Shards(str(data), None, None, "train", read_index(data / "train" / "index.json"))[0]["tokens"].shape == (32,)
    assert not [file for file in (data / "train").iterdir() if file.name.startswith(".")]


def test_two_runs_do_not_share_a_cache(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "CACHE_LOCK_SECONDS", 0.3)
    cache = tmp_path / "cache"
    load_manifest(cache, str(prepared))
    with live_streams(1, cache, prepared) as (process,):
        first_lines(process)
        with pytest.raises(ValueError, match=r"cache/train is in use by another run"):
            Shards(str(cache), str(prepared), None, "train", read_index(cache / "train" / "index.json"))
        kill_all(process)
        assert len(Shards(str(cache), str(prepared), None, "train", read_index(cache / "train" / "index.json"))) > 0


def test_streaming_is_imported_without_torchvision_and_nothing_is_left_replaced(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    program = """if True:
        import sys
        import bd3_scale.data.mosaicml
        left_out = ("torchvision", "transformers", "sklearn", "streaming.text")
        assert not {name for name in sys.modules if name.startswith(left_out)}
        import streaming, torch, transformers
        assert transformers.__version__
        loader = streaming.StreamingDataLoader(range(6), batch_size=2)
        assert isinstance(loader, torch.utils.data.DataLoader) and len(list(loader)) == 3
        assert not hasattr(streaming, "text")
        import streaming.multimodal
        assert streaming.multimodal.__file__
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())])}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100, env=environment)
