"""Check how ranks find each other: no other process can join them or make them run its code."""

from __future__ import annotations

import ipaddress
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bd3_scale.parallel.groups import process_groups
from bd3_scale.recipe.schema import ParallelRecipe
from bd3_scale.resilience.secret import shared_secret
from tests.parallel import strangers
from tests.support import forks
from tests.support.programs import BD3_SCALE
from tests.support.recipes import write_recipe
from tests.support.runs import rank_pid, records, wait_for

pytestmark = pytest.mark.launch


def test_another_user_cannot_join_as_a_rank_nor_have_a_pickle_read(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    forks.run_ranks(strangers.is_joined_by_a_stranger, 2, tmp_path / "written", logs=logs)


@pytest.mark.parametrize("case", [strangers.reads_what_a_stranger_wrote, strangers.knows_another_secret])
def test_what_a_stranger_says_is_found_out(case: Callable[[], None], tmp_path: Path) -> None:
    forks.run_ranks(case, 2, logs=tmp_path)


def test_ranks_read_no_pickles_of_each_other(topics: Path, tmp_path: Path) -> None:
    run = {"data": {"path": str(topics)}, "run_dir": str(tmp_path / "run"), "parallel": {"tensor": 2}}
    run |= {"train": {"steps": 4}, "evaluation": {"every_steps": 2, "sequences": 8}, "checkpoint": {"every_steps": 2}}
    forks.run_ranks(strangers.trains, 2, write_recipe(tmp_path / "recipe.yaml", **run), logs=tmp_path / "logs")
    assert [record["step"] for record in records(tmp_path / "run") if "eval/nelbo" in record] == [2, 4]


def test_a_local_run_listens_to_nobody_else_and_leaves_nothing_to_meet_in(topics: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", train={"steps": 100000}, data={"path": str(topics), "num_workers": 1})
    program = forks.Program([BD3_SCALE, "train", path, "launch.processes=2", "parallel.tensor=2"], cwd=tmp_path)
    try:
        wait_for(lambda: records(tmp_path / "runs" / "tiny"))
        ranks = [rank_pid(program.pid, rank) for rank in (0, 1)]
        listening = [address for rank in ranks for address in listens_at(rank)]
        assert listening, "gloo has a port a rank"
        assert all(address.is_loopback for address in listening), listening
        # The launcher keeps its folder open and thereby locked.
        held = [Path(os.readlink(link)) for link in Path(f"/proc/{program.pid}/fd").iterdir()]
        (secret,) = {path / "secret" for path in held if path.name.startswith("bd3_scale-launch-") and path.is_dir()}
        assert stat.S_IMODE(secret.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        program.send_signal(signal.SIGTERM)
        assert program.wait() == 0
        assert not secret.parent.exists()
    finally:
        program.end()


def listens_at(pid: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Return the addresses of a process's listening TCP sockets."""
    mine = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    for kind in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in mine:
                words = bytes.fromhex(local.partition(":")[0])
                found.append(ipaddress.ip_address(b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))))
    return found


def test_the_sockets_of_a_process_are_found() -> None:
    for address in ("0.0.0.0", "127.0.0.1", "::", "::1"):
        program = f"import socket; s = socket.create_server(({address!r}, 0), family=socket.{family(address)})"
        child = subprocess.Popen(
            [sys.executable, "-c", f"{program}; print(flush=True); input()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with child:
            assert child.stdout is not None
            child.stdout.readline()
            assert [str(found) for found in listens_at(child.pid)] == [address]
            child.kill()


def family(address: str) -> str:
    return "AF_INET6" if ":" in address else "AF_INET"


def test_the_first_makes_the_secret_and_all_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".secret"
    code = "import sys; from pathlib import Path; from bd3_scale.resilience.secret import shared_secret; "
    code += "input(); print(shared_secret(Path(sys.argv[1])).hex())"
    children = [
        subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    told = {child.communicate(b"\n", timeout=60)[0] for child in children}
    assert told == {shared_secret(path).hex().encode() + b"\n"}
    assert os.listdir(path.parent) == [".secret"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert shared_secret(tmp_path / "other") != shared_secret(path)


def is_a_link(path: Path) -> None:
    path.with_name("elsewhere").write_bytes(bytes(32))
    path.with_name("elsewhere").chmod(0o600)
    path.symlink_to("elsewhere")


def is_readable_by_others(path: Path) -> None:
    path.write_bytes(bytes(32))
    path.chmod(0o640)


def is_another_users(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    path.write_bytes(bytes(32))
    path.chmod(0o600)
    os.chown(path, strangers.NOBODY, strangers.NOBODY)


def is_a_pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


def is_cut_short(path: Path) -> None:
    path.write_bytes(b"short")
    path.chmod(0o600)


@pytest.mark.parametrize("spoil", [is_a_link, is_readable_by_others, is_another_users, is_a_pipe, is_cut_short])
def test_a_secret_that_others_may_have_made_or_read_is_refused(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / ".secret"
    spoil(path)
    with pytest.raises((ValueError, OSError), match=r"\.secret"):
        shared_secret(path)


def test_process_groups_leave_a_notebook_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    def state() -> list[object]:
        handlers = [signal.getsignal(number) for number in signal.valid_signals()]
        return [sys.stdout, sys.stderr, tempfile.gettempdir(), handlers]

    def work() -> None:
        with process_groups(ParallelRecipe()):
            assert state() == before
            raise RuntimeError("mine")

    before = state()
    with pytest.raises(RuntimeError, match="mine"):
        work()
    assert state() == before
    assert capfd.readouterr().out == ""
