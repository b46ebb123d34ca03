"""Check that a forked program behaves as in an interpreter: its output, its end, and the programs that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import forks
from tests.support.programs import BD3_SCALE
from tests.support.runs import is_alive, wait_for

pytestmark = pytest.mark.launch

MEETS = "import torch.distributed as d; d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1); "
MEETS += "d.new_group([0]); print('met'); d.destroy_process_group()"
PROGRAMS = {
    "arguments, place and environment": "import os, sys; print(sys.argv[1:], os.getcwd(), dict(os.environ))",
    "both outputs": "import sys; print('out'); print('err', file=sys.stderr); print('é\\udc80', file=sys.stderr)",
    "a word at the end": "import sys; sys.exit('no data')",
    "a code": "import sys; sys.exit(300)",
    "an error": "raise ValueError('a mistake')",
    "at once": "import os; print('unseen'); os._exit(7)",
    "a signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "an interrupt": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "what comes last": "import atexit; atexit.register(print, 'last'); print('first')",
    "a thread that ends later": "import threading; threading.Timer(0.2, print, ['late']).start()",
    "no input": "import sys; print(repr(sys.stdin.read()))",
    "workers": "import multiprocessing as m; print(m.get_start_method(), m.parent_process(), m.current_process().name)",
    "its name": "print(__name__, __import__('__main__').__dict__ is globals())",
    "a child": "import subprocess as s, sys; s.run([sys.executable, '-c', 'print(2)'])",
    "a child's end": "import subprocess as s, sys; print(s.call([sys.executable, '-c', 'raise SystemExit(3)']))",
    "a child that meets others": f"{MEETS}; import subprocess as s, sys; s.run([sys.executable, '-c', {MEETS!r}])",
    "not Python": "import subprocess as s; print(s.run(['echo', 'shell'], capture_output=True).stdout)",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_what_an_interpreter_would_do(program: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", program, "one", "two words"]
    environment = {"PATH": os.environ["PATH"], "LC_CTYPE": "C.UTF-8"}
    how = {"cwd": tmp_path, "env": environment}
    real = subprocess.run(command, **how, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    forked = forks.run(command, **how)
    assert (forked.returncode, forked.stdout) == (real.returncode, real.stdout)
    assert forked.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_an_end_takes_everything_along(tmp_path: Path) -> None:
    child = "import time; open('child', 'w').write(str(__import__('os').getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    program = forks.Program([sys.executable, "-c", parent], cwd=tmp_path)
    wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    program.end()
    assert program.returncode == -signal.SIGKILL
    child_pid = int((tmp_path / "child").read_text())
    wait_for(lambda: not is_alive(child_pid), 20)  # long before it would end by itself


def test_a_program_that_takes_too_long_is_ended_with_what_it_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; print('so far', flush=True); time.sleep(60)"]
    with pytest.raises(subprocess.TimeoutExpired) as late:
        forks.run(command, cwd=tmp_path, timeout=2)  # a busy machine takes a while to start it
    assert late.value.output == "so far\n"


def test_the_command_line_is_the_one_that_is_installed(tmp_path: Path) -> None:
    for arguments in (["--help"], ["evaluate"], ["train", "nowhere.yaml"]):
        command = [BD3_SCALE, *arguments]
        environment = os.environ | {"COLUMNS": "100", "TERM": "dumb"}
        real = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        forked = forks.run(command, cwd=tmp_path, env=environment)
        found, expected = ((done.returncode, done.stdout, done.stderr.splitlines()[-1:]) for done in (forked, real))
        assert found == expected
