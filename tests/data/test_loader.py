"""Test loader workers with real processes that fail, are killed, or lose their rank."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from bd3_scale.data import loader
from bd3_scale.data.index import read_index
from bd3_scale.data.loader import Workers
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.shards import Shards
from bd3_scale.data.stream import TrainingStream
from bd3_scale.recipe.schema import DataRecipe
from tests.data.documents import SEQ_LEN

CLONE_NEWNS = 0x00020000
MS_REC_PRIVATE = 0x44000


def numbers(worker: int, count: int) -> Iterator[int]:
    while True:
        yield worker
        worker += count


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def test_items_come_in_turns_and_so_many_are_made_ahead(tmp_path: Path) -> None:
    def items(worker: int, count: int) -> Iterator[tuple[int, bytes]]:
        for number in numbers(worker, count):
            (tmp_path / str(number)).touch()
            yield number, bytes(10**6)

    workers = Workers(items, 3, 4)
    assert [next(workers)[0] for _ in range(10)] == list(range(10))
    # Of each worker one is on its way and one waits for a place.
    most = 10 + 3 * (4 + 2)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < most and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    assert len(list(tmp_path.iterdir())) == most


@pytest.mark.parametrize("error", [ValueError("shard 3 is damaged"), PermissionError(13, "Permission denied", "shard")])
def test_an_error_for_people_is_raised_as_it_is(error: Exception) -> None:
    def items(worker: int, count: int) -> Iterator[int]:
        yield 1
        raise error

    workers = Workers(items, 1, 4)
    assert next(workers) == 1
    with pytest.raises(type(error)) as caught:
        next(workers)
    assert str(caught.value) == str(error)


def test_any_other_error_comes_with_its_traceback() -> None:
    def items(worker: int, count: int) -> Iterator[int]:
        yield 1 // worker

    with pytest.raises(RuntimeError, match=r"(?s)loader worker 0 failed.*yield 1 // worker.*ZeroDivisionError"):
        next(Workers(items, 1, 4))


def test_what_cannot_be_sent_is_no_hang() -> None:
    with pytest.raises(ConnectionError, match=r"loader worker \d+ ended with exit code 1"):
        next(Workers(lambda worker, count: iter([lambda: None]), 1, 4))


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, "SIGKILL, as the kernel does when memory"), (signal.SIGBUS, "SIGBUS")]
)
def test_a_worker_that_is_killed_is_named_at_once(number: signal.Signals, words: str) -> None:
    def items(worker: int, count: int) -> Iterator[int]:
        for item in numbers(worker, count):
            if item > 5:
                faulthandler.disable()
                os.kill(os.getpid(), number)
            yield item

    workers = Workers(items, 2, 1)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=f"the loader worker .* was killed by {words}"):
        for _ in workers:
            pass
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_a_workers_first_moments_does_not_end_it(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = loader._work

    def slowly(*arguments: object) -> None:
        time.sleep(0.5)
        work(*arguments)

    monkeypatch.setattr(loader, "_work", slowly)
    before, mask = children(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    workers = Workers(numbers, 2, 4)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    for worker in children() - before:
        # Not by os.kill: SIGTERM of the rank itself is how it ends a worker.
        assert os.spawnv(os.P_WAIT, "/bin/kill", ["kill", f"-{number}", str(worker.pid)]) == 0
    assert [next(workers), next(workers)] == [0, 1]


def test_workers_end_with_what_holds_them() -> None:
    before = children()
    workers = Workers(numbers, 2, 4)
    next(workers)
    mine = children() - before
    assert len(mine) == 2
    del workers
    gc.collect()
    assert not any(process.is_running() for process in mine)


def test_workers_end_soon_after_a_rank_that_is_killed(tmp_path: Path) -> None:
    def busy(worker: int, count: int) -> Iterator[int]:
        (tmp_path / str(os.getpid())).touch()
        yield 0
        time.sleep(1000)
        yield 1

    pid = os.fork()
    if pid == 0:
        try:
            workers = Workers(busy, 2, 4)
            next(workers)
            signal.pause()
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    processes = [psutil.Process(int(path.name)) for path in tmp_path.iterdir()]
    assert len(processes) == 2
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert psutil.wait_procs(processes, timeout=10)[1] == []


only_root_can_mount = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


@only_root_can_mount
@pytest.mark.launch
@pytest.mark.parametrize("size", ["4k", "64k"])
def test_batches_need_no_shared_memory(prepared: Path, size: str) -> None:
    def read() -> None:
        Path("/dev/shm/x_bd3_scale.lock").mkdir()  # as a stranger may
        data = DataRecipe(path=str(prepared), seq_len=SEQ_LEN, num_workers=3)
        manifest = load_manifest(prepared)
        stream = TrainingStream(data, manifest, global_batch_size=12, dp_rank=0, dp_size=1, seed=7)
        alone = data.model_copy(update={"num_workers": 0})
        expected = TrainingStream(alone, manifest, global_batch_size=12, dp_rank=0, dp_size=1, seed=7)
        for _ in range(60):
            batch, other = next(stream), next(expected)
            assert all(torch.equal(value, vars(other)[name]) for name, value in vars(batch).items())

    assert in_small("/dev/shm", size, read) == (0, "")


@only_root_can_mount
@pytest.mark.launch
def test_a_full_temporary_folder_is_named(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    table = read_index(prepared / "train" / "index.json")
    code, said = in_small(str(tmp_path), "4k", lambda: Shards(str(prepared), None, None, "train", table))
    assert code == 1
    assert "No space left on device; make room there, or set TMPDIR to another folder" in said
    assert str(tmp_path) in said


def in_small(mount_point: str, size: str, action: Callable[[], object]) -> tuple[int, str]:
    """Exit code (negative: of a signal) and error of a process that runs `action` where so much fits a file system."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.unshare(CLONE_NEWNS) == 0
            assert libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None) == 0
            assert libc.mount(b"tmpfs", mount_point.encode(), b"tmpfs", 0, f"size={size}".encode()) == 0
            signal.alarm(60)
            action()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001
            os.write(writer, str(error).encode())
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as file:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code, file.read()
