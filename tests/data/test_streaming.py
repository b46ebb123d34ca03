from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from bd3_scale.data import mosaicml
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.mosaicml import SHARED_MEMORY
from bd3_scale.data.shards import Shards

pytestmark = pytest.mark.launch

HOLD = Path(__file__).with_name("hold_stream.py")


@contextmanager
def live_streams(count: int, *arguments: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that start together and read from one folder, each in a session of its own."""
    command = [sys.executable, HOLD, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, **pipes, text=True, start_new_session=True) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            kill_all(process)


def first_lines(process: subprocess.Popen[str]) -> tuple[str, str]:
    """The first batch, and the prefix of the shared memory."""
    assert process.stdout is not None
    return process.stdout.readline(), f"{int(process.stdout.readline()):06}"


def read_on(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n" * count)
    process.stdin.flush()
    return [process.stdout.readline() for _ in range(count)]


def kill_all(process: subprocess.Popen[str]) -> None:
    """As a scheduler does: the rank, its loader workers and the tracker that would have cleaned up."""
    if process.poll() is None:
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        psutil.wait_procs(everyone, timeout=10)


def memory_of(prefix: str) -> set[str]:
    return {path.name.removeprefix(prefix) for path in SHARED_MEMORY.glob(f"{prefix}_*")}


@pytest.mark.alone  # any other start removes what the killed run left, too
def test_two_runs_share_an_unread_folder_and_only_what_the_killed_one_left_is_removed(
    prepared: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data, ignore=shutil.ignore_patterns("*.mds"))
    with live_streams(2, data) as (living, killed):
        (batch, kept), (same_batch, left) = first_lines(living), first_lines(killed)
        assert batch == same_batch
        assert kept != left
        assert read_on(living, 30) == read_on(killed, 30)
        assert {"".join(file.suffixes) for file in (data / "train").glob("shard*")} >= {".00000.mds", ".00001.mds.zstd"}
        assert not list((data / "train").glob("shard*.mds.????????"))
        kill_all(killed)
        assert {"_shard_states", "_cache_usage", "_bd3_scale.lock"} <= memory_of(left)
        before = memory_of(kept)
        shards = Shards(str(data), None, None, "train")
        assert memory_of(left) == set()
        assert memory_of(kept) == before
        assert shards[0]["tokens"].shape == (32,)
        assert len(set(read_on(living, 30))) == 30
        assert living.stdin is not None
        living.stdin.close()
        assert living.wait(30) == 0  # its loader worker does not keep it


def test_two_runs_do_not_share_a_cache(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaicml, "CACHE_LOCK_SECONDS", 0.3)
    cache = tmp_path / "cache"
    load_manifest(cache, str(prepared))
    with live_streams(1, cache, prepared) as (process,):
        first_lines(process)
        with pytest.raises(ValueError, match=r"cache/train is in use by another run"):
            Shards(str(cache), str(prepared), None, "train")
        kill_all(process)
        assert len(Shards(str(cache), str(prepared), None, "train")) > 0


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
