from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from bd3_scale.resilience.files import new_folder
from bd3_scale.resilience.leftovers import locked_folder, private_folder, try_lock

STRANGER = 65534
PREFIX = "work-"


def content(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()}


@contextmanager
def in_fork(action: Callable[[], None]) -> Iterator[int]:
    """Run `action` in a child process that then waits; yield its pid when `action` has run."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os.write(writer, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"x"
        yield pid
    finally:
        os.close(reader)
        kill(pid)


ENTERED: list[AbstractContextManager[Path]] = []


def enter(folder: AbstractContextManager[Path]) -> Path:
    """Enter a block that is never left."""
    ENTERED.append(folder)
    return folder.__enter__()


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def hold(parent: Path) -> Callable[[], None]:
    def action() -> None:
        folder = enter(locked_folder(parent, PREFIX))
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")

    return action


def test_a_folder_of_one_s_own_is_private_and_goes_with_the_block(tmp_path: Path) -> None:
    with locked_folder(tmp_path, PREFIX) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert content(tmp_path) == {folder.name, f"{folder.name}.lock"}
        # Locked, it is none that systemd-tmpfiles removes when it has been there for days.
        descriptor = os.open(folder, os.O_RDONLY)
        assert not try_lock(descriptor)
        os.close(descriptor)
    assert content(tmp_path) == set()


def test_what_a_killed_process_left_goes_and_what_a_living_one_uses_stays(tmp_path: Path) -> None:
    with in_fork(hold(tmp_path)) as killed, in_fork(hold(tmp_path)):
        assert len(content(tmp_path)) == 4
        kill(killed)
        with locked_folder(tmp_path, PREFIX) as mine:
            (living,) = {path for path in tmp_path.glob("*[0-9a-f]") if path != mine}
            assert (living / "deep" / "file").read_text() == "x"
        assert content(tmp_path) == {living.name, f"{living.name}.lock"}
    with locked_folder(tmp_path, "other-"):
        assert living.exists()  # of another kind
    with locked_folder(tmp_path, PREFIX):
        pass
    assert content(tmp_path) == set()


def test_a_folder_lives_as_long_as_a_child_that_shares_it(tmp_path: Path) -> None:
    """Check it for a child that outlives its parent, as loader workers outlive a killed rank for a moment."""
    pid_file = tmp_path / "child"
    folders = tmp_path / "folders"
    folders.mkdir()

    def action() -> None:
        hold(folders)()
        child = os.fork()
        if child == 0:
            signal.pause()
        pid_file.write_text(str(child))

    with in_fork(action) as parent:
        kill(parent)
        before = content(folders)
        with locked_folder(folders, PREFIX):
            assert content(folders) > before
    os.kill(int(pid_file.read_text()), signal.SIGKILL)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError("it waits for somebody else's entry")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_entries_that_are_no_files_and_links_neither_stop_it_nor_lead_it_elsewhere(tmp_path: Path) -> None:
    parent, precious = tmp_path / "shared", tmp_path / "precious"
    parent.mkdir()
    precious.mkdir()
    (precious / "thesis").write_text("x")
    os.mkfifo(parent / "work-00000001.lock")
    (parent / "work-00000002.lock").mkdir()
    (parent / "work-00000003.lock").symlink_to("work-00000003.lock")
    (parent / "work-00000004.lock").symlink_to("/dev/zero")
    (parent / "work-00000005.lock").write_text("")
    (parent / "work-00000005").symlink_to(precious)
    (parent / "work-00000006.lock").symlink_to(precious / "thesis")
    (parent / "work-00000007.lock").write_text("")
    (parent / "work-00000007").mkdir()
    (parent / "work-00000007" / "link").symlink_to(precious)
    before = content(parent)
    with time_limit(10), locked_folder(parent, PREFIX) as folder:
        assert folder.is_dir()
    assert before - content(parent) == {"work-00000007", "work-00000007.lock"}
    assert (precious / "thesis").read_text() == "x"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_nothing_of_another_user_is_opened_or_removed(tmp_path: Path) -> None:
    parent = tmp_path / "shared"
    parent.mkdir()
    parent.chmod(0o1777)
    (parent / "work-00000001.lock").write_text("")
    (parent / "work-00000001").mkdir()
    (parent / "work-00000002.lock").write_text("")
    (parent / "work-00000002").mkdir()
    for name in ("work-00000001.lock", "work-00000001", "work-00000002"):
        os.chown(parent / name, STRANGER, STRANGER)
    before = content(parent)
    with locked_folder(parent, PREFIX):
        pass
    assert content(parent) == before


def test_a_folder_under_a_known_name_is_taken_only_if_nobody_else_can_write_there(tmp_path: Path) -> None:
    path = tmp_path / "compiled"
    assert private_folder(path) == private_folder(path) == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(0o777)
    assert private_folder(path) is None
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert private_folder(link) is None
    if os.geteuid() == 0:
        path.chmod(0o700)
        os.chown(path, STRANGER, STRANGER)
        assert private_folder(path) is None


@pytest.mark.parametrize("killed_after", ["", "file"])
def test_what_a_killed_process_left_of_a_destination_is_removed_by_the_next(tmp_path: Path, killed_after: str) -> None:
    def begin(name: str) -> Callable[[], None]:
        def action() -> None:
            folder = enter(new_folder(tmp_path / name))
            (folder / killed_after).write_text("x") if killed_after else None

        return action

    with in_fork(begin("out")) as killed, in_fork(begin("out")), in_fork(begin("out.1")) as other:
        kill(killed)
        kill(other)
        assert len(content(tmp_path)) == 6
        with new_folder(tmp_path / "out"):
            pass
        assert {name.rpartition(".")[0] for name in content(tmp_path) if not name.endswith(".lock")} == {
            "",
            ".out",  # of the process that lives
            ".out.1",  # of another destination
        }
        assert len(content(tmp_path)) == 5
    shutil.rmtree(tmp_path / "out")
    with new_folder(tmp_path / "out"), new_folder(tmp_path / "out.1"):
        pass
    assert content(tmp_path) == {"out", "out.1"}


def test_it_runs_on_the_standard_library_of_any_python() -> None:
    program = "import sys; import bd3_scale.resilience.leftovers; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-S", "-c", program], check=True, timeout=60, cwd=Path(__file__).parents[2])
