from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bd3_scale.launch.hangs import HangDetector
from bd3_scale.launch.local import launch

pytestmark = pytest.mark.launch

LAUNCHER = """
import sys
from pathlib import Path
from bd3_scale.launch import local
local.GRACE_SECONDS = 1.0
sys.exit(local.launch([sys.executable, "-c", sys.argv[1]], 2, 3, Path(sys.argv[2])))
"""

# A rank that writes down each signal it gets and ends a little after SIGTERM.
RECORDER = """
import os, signal, sys, time
from pathlib import Path
record = Path(os.environ["LOGS"]) / ("signals" + os.environ["RANK"])
got = []
def note(number, frame):
    got.append(signal.Signals(number).name)
    record.write_text(" ".join(got))
for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"):
    signal.signal(getattr(signal, name), note)
record.with_name("pid" + os.environ["RANK"]).write_text(str(os.getpid()))
while "SIGTERM" not in got:
    time.sleep(0.02)
time.sleep(0.2)
"""


def run(rank_program: str, logs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LAUNCHER, rank_program, str(logs)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def start(rank_program: str, logs: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", LAUNCHER, rank_program, str(logs)]
    logs.mkdir()
    return subprocess.Popen(
        command, env=os.environ | {"LOGS": str(logs)}, stderr=subprocess.PIPE, start_new_session=True
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def rank_pids(logs: Path) -> list[int]:
    wait_for(lambda: all((logs / f"pid{k}").exists() and (logs / f"pid{k}").read_text() for k in (0, 1)))
    return [int((logs / f"pid{k}").read_text()) for k in (0, 1)]


def test_ranks_get_the_environment_that_torchrun_documents_and_a_private_folder_to_meet_in(tmp_path: Path) -> None:
    program = f"""
import json, os
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"]
mine = {{name: int(os.environ[name]) for name in names}}
mine["mode"] = oct(os.stat(os.environ["BD3_SCALE_RENDEZVOUS"]).st_mode & 0o777)
mine["interfaces"] = [os.environ[kind + "_SOCKET_IFNAME"] for kind in ("GLOO", "NCCL")]
open({str(tmp_path / "met")!r} + os.environ["RANK"], "w").write(json.dumps(mine))
assert "MASTER_PORT" not in os.environ
"""
    assert run(program, tmp_path / "logs").returncode == 0
    common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 3, "mode": "0o700", "interfaces": ["lo", "lo"]}
    met = [json.loads((tmp_path / f"met{k}").read_text()) for k in (0, 1)]
    assert met == [{"RANK": k, "LOCAL_RANK": k, **common} for k in (0, 1)]


def test_rank_0_speaks_and_the_others_write_logs(tmp_path: Path) -> None:
    program = """
import os, sys
print("out of", os.environ["RANK"], flush=True)
print("err of", os.environ["RANK"], file=sys.stderr, flush=True)
"""
    for _ in range(2):
        done = run(program, tmp_path)
        assert (done.stdout, done.stderr) == ("out of 0\n", "err of 0\n")
    assert (tmp_path / "rank1.log").read_text() == "out of 1\nerr of 1\n" * 2
    assert not (tmp_path / "rank0.log").exists()


def test_a_failing_rank_ends_the_run_with_its_code_and_last_words(tmp_path: Path) -> None:
    program = """
import os, sys, time
if os.environ["RANK"] == "1":
    print("\\n".join(f"line {i}" for i in range(100)))
    sys.exit("the shard is gone")
time.sleep(60)
"""
    begin = time.monotonic()
    done = run(program, tmp_path)
    assert time.monotonic() - begin < 10
    assert done.returncode == 1
    assert "rank 1 failed with exit code 1" in done.stderr
    assert "the shard is gone" in done.stderr
    assert "line 99" in done.stderr
    assert "line 50" not in done.stderr


def test_the_rank_that_failed_first_is_blamed_not_the_one_that_lost_its_peer(tmp_path: Path) -> None:
    program = """
import os, socket, sys, time
address = os.path.join(os.environ["BD3_SCALE_RENDEZVOUS"], "socket")
if os.environ["RANK"] == "0":
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        peer, _ = server.accept()
        peer.recv(1)
        time.sleep(0.1)  # less than a rank takes that has a traceback to write
        sys.exit(4)
connection = socket.socket(socket.AF_UNIX)
while connection.connect_ex(address):
    pass
os._exit(7)
"""
    done = run(program, tmp_path)
    assert done.returncode == 7
    assert "rank 1 failed with exit code 7" in done.stderr
    assert "rank 0" not in done.stderr


def test_a_rank_killed_by_a_signal_is_named_and_counts_as_failed(tmp_path: Path) -> None:
    done = run("import os; os.environ['RANK'] == '0' and os.kill(os.getpid(), 9)", tmp_path)
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 0 was killed by SIGKILL" in done.stderr


def test_what_an_earlier_run_wrote_does_not_explain_this_one(tmp_path: Path) -> None:
    run("import os, sys; os.environ['RANK'] == '1' and sys.exit('the disk of yesterday')", tmp_path)
    done = run("import os; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9)", tmp_path)
    assert "rank 1 was killed by SIGKILL; it wrote nothing to" in done.stderr
    assert "yesterday" not in done.stderr


def test_a_rank_deaf_to_sigterm_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys, time
from pathlib import Path
deaf = Path({str(tmp_path / "deaf")!r})
if os.environ["RANK"] == "0":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    deaf.touch()
    time.sleep(60)
while not deaf.exists():
    time.sleep(0.02)
sys.exit(5)
"""
    begin = time.monotonic()
    assert run(program, tmp_path).returncode == 5
    assert 1.0 < time.monotonic() - begin < 15


@pytest.mark.parametrize("to_group", [False, True], ids=["launcher", "terminal"])
def test_signals_reach_every_rank_exactly_once(tmp_path: Path, to_group: bool) -> None:
    logs = tmp_path / "logs"
    launcher = start(RECORDER, logs)
    rank_pids(logs)
    send = os.killpg if to_group else os.kill
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
        send(launcher.pid, number)
        wait_for(lambda name=number.name: all(name in _read(logs / f"signals{k}") for k in (0, 1)))
    assert launcher.wait(timeout=10) == 0
    assert [_read(logs / f"signals{k}") for k in (0, 1)] == ["SIGHUP SIGUSR1 SIGINT SIGTERM"] * 2


def test_a_hangup_that_is_ignored_is_not_passed_on(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    command = ["nohup", sys.executable, "-c", LAUNCHER, RECORDER, str(logs)]
    environment = os.environ | {"LOGS": str(logs)}
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rank_pids(logs)
    launcher.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    launcher.terminate()
    assert launcher.wait(timeout=10) == 0
    assert [_read(logs / f"signals{k}") for k in (0, 1)] == ["SIGTERM"] * 2


def test_a_stderr_that_cannot_be_written_leaves_nothing_running_and_the_exit_code(tmp_path: Path) -> None:
    program = "import os, sys, time; sys.exit(5) if os.environ['RANK'] == '1' else time.sleep(60)"
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", LAUNCHER, program, str(tmp_path)]
        assert subprocess.run(command, stderr=full, timeout=30, check=False).returncode == 5


def test_the_end_of_a_log_is_shown_without_what_a_terminal_would_obey(tmp_path: Path) -> None:
    done = run("import os, sys; os.environ['RANK'] == '1' and sys.exit('\x1b[2Jgone')", tmp_path)
    assert r"\x1b[2Jgone" in done.stderr
    assert "\x1b" not in done.stderr


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    launcher = start(RECORDER, logs)
    pids = rank_pids(logs)
    assert all(map(is_alive, pids))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(map(is_alive, pids)))


def test_a_folder_that_a_killed_launcher_left_is_removed_and_a_living_one_s_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    launchers, folders = {}, []
    for name in ("living", "killed"):
        launchers[name] = start(RECORDER, tmp_path / name)
        rank_pids(tmp_path / name)
        folders += [path for path in tmp_path.glob("bd3_scale-launch-????????") if path not in folders]
    launchers["killed"].kill()
    launchers["killed"].wait()
    assert all(path.exists() for path in folders)
    assert launch(["true"], 1, 1, None) == 0
    assert [path for path in folders if path.exists()] == folders[:1]
    launchers["living"].terminate()
    assert launchers["living"].wait(timeout=10) == 0
    assert not list(tmp_path.glob("bd3_scale-launch-*"))


def test_a_stranger_s_entries_in_the_temporary_folder_stop_no_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("x", "00000001", "00000001.lock", "00000002.lock"):
        os.mkfifo(tmp_path / f"bd3_scale-launch-{name}")
        os.utime(tmp_path / f"bd3_scale-launch-{name}", (0, 0))
    (tmp_path / "bd3_scale-launch-00000003.lock").symlink_to("bd3_scale-launch-00000003.lock")
    before = set(tmp_path.iterdir())
    program = "import sys; from bd3_scale.launch.local import launch; sys.exit(launch(['true'], 1, 1, None))"
    assert subprocess.run([sys.executable, "-c", program], timeout=20, check=False).returncode == 0
    assert set(tmp_path.iterdir()) == before


def test_ranks_are_not_taken_for_hung_where_everything_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch = HangDetector(tmp_path, 1)
    deadlines = {"start": 100.0, "step": 100.0}

    def ask_after(seconds: float) -> str | None:
        nonlocal now
        now += seconds
        return watch.find_hang(deadlines)

    (tmp_path / "rank0.json").write_text('{"phase": "step", "step": 3, "beat": 7}')
    assert [ask_after(seconds) for seconds in (1, 50, 500, 50)] == [None] * 4
    found = ask_after(51)
    assert found is not None
    assert "hang in phase 'step' after 100 s" in found
    assert "ranks [0] do not run" in found


def test_ranks_that_wait_for_one_that_waits_for_its_data_are_not_taken_for_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch = HangDetector(tmp_path, 2)
    deadlines = {"start": 20.0, "step": 20.0, "data": 100.0}

    def ask_after(seconds: float, phase: str) -> str | None:
        nonlocal now
        (tmp_path / "rank0.json").write_text(f'{{"phase": "{phase}", "step": 3, "beat": {now:.0f}}}')
        (tmp_path / "rank1.json").write_text(f'{{"phase": "step", "step": 3, "beat": {now:.0f}}}')
        now += seconds
        return watch.find_hang(deadlines)

    assert [ask_after(seconds, "data") for seconds in (1, 40, 40)] == [None] * 3
    # Their own deadline begins when the data are there.
    assert [ask_after(seconds, "step") for seconds in (1, 19)] == [None] * 2
    assert "hang in phase 'step' after 20 s" in (ask_after(2, "step") or "")
    assert [ask_after(seconds, "data") for seconds in (1, 50, 49)] == [None] * 3
    assert "hang in phase 'data' after 100 s" in (ask_after(2, "data") or "")


def test_a_job_of_an_earlier_version_has_no_deadline_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch = HangDetector(tmp_path, 1)
    (tmp_path / "rank0.json").write_text('{"phase": "data", "step": 3, "beat": 7}')
    deadlines = {"start": 20.0, "step": 20.0, "evaluation": 50.0}
    assert watch.find_hang(deadlines) is None
    now = 49.0
    assert watch.find_hang(deadlines) is None
    now = 51.0
    assert "hang in phase 'data' after 50 s" in (watch.find_hang(deadlines) or "")


def test_what_cannot_start_leaves_nothing_running_and_no_handler_behind(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FileNotFoundError):
        launch(["/no/such/program"], 2, 1, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        launch([sys.executable, "-c", "pass"], 2, 1, tmp_path / "file" / "logs")
    (tmp_path / "rank1.log").mkdir()
    marker = tmp_path / "still alive"
    with pytest.raises(IsADirectoryError):
        launch([sys.executable, "-c", f"import time; time.sleep(1); open({str(marker)!r}, 'w')"], 2, 1, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    time.sleep(1.2)
    assert not marker.exists()


def test_a_rank_takes_no_module_from_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "fractions.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    program = "import sys; from bd3_scale.launch.local import launch; "
    program += "sys.exit(launch([sys.executable, '-m', 'statistics'], 1, 1, None))"  # which imports fractions
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 0
    assert not (tmp_path / "was run").exists()
