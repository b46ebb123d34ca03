from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bd3_scale.launch.supervise import EXIT_USER_ERROR
from bd3_scale.recipe.schema import Recipe
from bd3_scale.resilience.limits import check_limits, exhausted_limit
from bd3_scale.train import main
from tests.support.recipes import tiny_recipe

FILES, MEMORY = resource.RLIMIT_NOFILE, resource.RLIMIT_AS
REPOSITORY = Path(__file__).parents[2]


def in_fork(limit: int, soft: int, hard: int, action: Callable[[], str | None]) -> str:
    """Return what `action` returns, or the message of its ValueError, in a process with this limit."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(limit, (soft, hard))
            try:
                result = action()
            except ValueError as error:
                result = str(error)
            os.write(writer, str(result).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as file:
        return file.read()


def check() -> str:
    check_limits()
    return str(resource.getrlimit(FILES)[0])


def test_the_limit_of_open_files_is_raised_as_far_as_may_be() -> None:
    assert in_fork(FILES, 64, 3000, check) == "3000"


def test_limits_that_leave_no_room_are_named_before_anything_begins() -> None:
    assert "64 files open (ulimit -n), which is too few: set it to" in in_fork(FILES, 64, 64, check)
    too_little = in_fork(MEMORY, 10**9, resource.RLIM_INFINITY, check)
    assert "0.9 GiB of address space (ulimit -v), which is too little: set it to unlimited" in too_little


def test_an_error_that_comes_from_a_limit_names_it() -> None:
    def open_all() -> str | None:
        files = []
        try:
            while True:
                files.append(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            for file in files:
                os.close(file)
            return exhausted_limit(error)

    def allocate() -> str | None:
        try:
            return str(len(bytearray(4 << 40)))
        except MemoryError as error:
            return exhausted_limit(error)

    assert "100 files open (ulimit -n)" in in_fork(FILES, 100, 100, open_all)
    assert "(ulimit -v)" in in_fork(MEMORY, 1 << 40, 1 << 40, allocate)
    gloo = RuntimeError("[enforce fail at loop.cc:105] fd_ != -1. -1 vs -1. epoll_create: Too many open files")
    assert "files open (ulimit -n)" in str(exhausted_limit(gloo))


def test_a_full_gpu_says_what_was_asked_for_and_what_to_change() -> None:
    """Check it with the message of PyTorch 2.13."""
    words = (
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is "
        "free. Including non-PyTorch memory, this process has 77.90 GiB memory in use."
    )
    message = str(exhausted_limit(torch.OutOfMemoryError(words)))
    assert message.startswith(
        "the GPU is out of memory of 79.10 GiB when 2.50 GiB are requested: set train.recompute=full"
    )
    assert str(exhausted_limit(torch.OutOfMemoryError("no room"))).startswith(
        "the GPU is out of memory: set train.recompute"
    )


def test_a_rank_without_room_on_its_gpu_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Check for exit code 2: a person must fix something, and no supervisor restarts the run."""

    def train(recipe: object, heartbeat: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    monkeypatch.setattr(main, "train", train)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main.main(Recipe.model_validate(tiny_recipe()))
    assert ended.value.code == EXIT_USER_ERROR == 2


def test_other_errors_come_from_no_limit() -> None:
    for error in (ValueError("seed=x"), FileNotFoundError(2, "No such file"), MemoryError(), RuntimeError("mat1 and")):
        assert exhausted_limit(error) is None


@pytest.mark.parametrize(("limit", "named"), [("-n 64", "(ulimit -n)"), ("-v 2000000", "(ulimit -v)")])
def test_a_rank_ends_at_once_and_says_which_limit(tmp_path: Path, limit: str, named: str) -> None:
    command = f"ulimit {limit}; exec {sys.executable} -m bd3_scale.train {tmp_path}/recipe.yaml"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=100, cwd=REPOSITORY)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert named in line
