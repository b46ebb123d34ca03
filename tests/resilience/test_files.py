"""Test writes that fail half-way, readers during writes, and folders that are not writable."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_scale.resilience.files import Lines, check_writable, remove_partial_files, write_atomically


@pytest.mark.parametrize(("data", "stored"), [("p̂ = 1\n", "p̂ = 1\n".encode()), (b"\x00\xff", b"\x00\xff")])
def test_text_and_bytes_replace_the_old_file(tmp_path: Path, data: str | bytes, stored: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    write_atomically(path, data)
    assert path.read_bytes() == stored
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_fails_half_way_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.launch
def test_a_reader_never_meets_half_a_file_even_when_the_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    size = 200_000
    write_atomically(path, b"0" * size)
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import itertools, sys, pathlib\n"
            "from bd3_scale.resilience.files import write_atomically\n"
            f"for i in itertools.count(): write_atomically(pathlib.Path(sys.argv[1]), str(i % 10).encode() * {size})",
            str(path),
        ]
    )
    seen = set()
    while len(seen) < 4:
        data = path.read_bytes()
        assert len(data) == size
        assert data == data[:1] * size
        seen.add(data[:1])
    writer.kill()
    writer.wait()
    assert len(path.read_bytes()) == size


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", needed_bytes=1)
    assert os.listdir(tmp_path / "a" / "b") == []


def test_too_little_room_is_said_in_gigabytes(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"1000000000\.00 GB are needed .* make room") as caught:
        check_writable(tmp_path, needed_bytes=10**18)
    assert caught.value.errno == errno.ENOSPC


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match="a part of this path is a file; choose another"):
        check_writable(tmp_path / "run")


def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o555)
    child = os.fork()
    if child == 0:
        # Permissions do not bind root: the check runs as nobody where the tests run as root.
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            check_writable(folder)
        except PermissionError as error:
            os._exit(0 if str(folder) in str(error) and "make it writable" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_lines_wait_on_a_full_disk(tmp_path, caplog):
    """Check it with the file-size limit of the process: like a full disk, it fails a write half-way through a line."""
    path = tmp_path / "lines"
    lines = Lines(path)
    lines.write("first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        lines.write("second")
        lines.write("third")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "first\nseco"
    assert (
        caplog.text.count("cannot be written: [Errno 27] File too large; its lines are kept in memory until it can")
        == 1
    )
    lines.write("fourth")
    assert path.read_text() == "first\nsecond\nthird\nfourth\n"
    lines.close()


def test_what_a_killed_write_left_aside_is_removed_and_nothing_else(tmp_path):
    for name in (".latest.0123abcd", ".recipe.yaml.89abcdef", ".lock", "step-00000001", ".hidden", "x.0123abcd"):
        (tmp_path / name).touch()
    remove_partial_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "step-00000001", ".hidden", "x.0123abcd"}
    remove_partial_files(tmp_path / "nowhere")
