"""Turn a fork of this process into another Python program, as `exec` does, but keep the modules that are imported."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import multiprocessing
import multiprocessing.process
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

BD3_SCALE = Path(sys.executable).with_name("bd3-scale")
ALONE = "bd3_scale.convert.check_export"  # makes no process groups
_PR_SET_NAME = 15
_SERVER_PATH = tuple(sys.path)
_LIBC = ctypes.CDLL(None, use_errno=True)
_MAIN_PROCESS = type(multiprocessing.process.current_process())


def is_forkable(command: Sequence[str]) -> bool:
    """Return whether `command` is `bd3-scale`, or this interpreter with a module, a script or a line of code."""
    if command[0] == str(BD3_SCALE):
        return True
    rest = without_warnings(command[1:])
    return command[0] == sys.executable and bool(rest) and (rest[0] in ("-m", "-c") or not rest[0].startswith("-"))


def without_warnings(arguments: Sequence[str]) -> list[str]:
    """Return arguments without `-W ignore`, which is meant for imports that are already done."""
    return list(arguments[2:] if arguments[:1] == ["-W"] else arguments)


def become(
    command: Sequence[str], *, cwd: str | None, env: Mapping[str, str] | None, fds: Sequence[int], keep: Any = None
) -> NoReturn:
    """Run `command` in this process, which was just forked, and end it.

    fds: the new stdin, stdout and stderr; -1 keeps the present one. keep: called at the end of the preparations, as
    `preexec_fn` of `subprocess.Popen`.
    """
    code = 1
    try:
        _forget_the_parent()
        _take_over(fds)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
            _take_path(env.get("PYTHONPATH", "").split(os.pathsep))
        if cwd is not None:
            os.chdir(cwd)
        _name_after_rank()
        if keep is not None:
            keep()
        torch_threads()
        subprocess.Popen = ForkingPopen  # type: ignore[misc]
        code = _exit_code(command)
    except BaseException:  # noqa: BLE001 - a fork must never go on as its parent
        traceback.print_exc()
    finally:
        os._exit(code)


def _forget_the_parent() -> None:
    """Forget what an exec drops: handlers of signals, timers, what is cleaned up at the end."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    faulthandler.cancel_dump_traceback_later()
    tempfile.tempdir = None
    weakref.finalize._registry.clear()
    multiprocessing.util._finalizer_registry.clear()
    # Its descriptors are closed next, and other files may get their numbers.
    tracker = multiprocessing.resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None
    multiprocessing.process._children.clear()
    multiprocessing.process._current_process = _MAIN_PROCESS()
    multiprocessing.process._parent_process = None
    multiprocessing.set_start_method(None, force=True)


def _take_path(folders: Sequence[str]) -> None:
    """Take PYTHONPATH as an interpreter does at its start; what a parent imported from there is imported again."""
    sys.path[:] = [*(folder for folder in folders if folder and folder not in _SERVER_PATH), *_SERVER_PATH]
    for name, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None) or ""
        if any(origin.startswith(f"{folder}/") for folder in sys.path if folder not in _SERVER_PATH):
            del sys.modules[name]


def _take_over(fds: Sequence[int]) -> None:
    # Copy first: one of them may be 1 or 2 itself.
    copies = [os.dup(number if fd == -1 else fd) for number, fd in enumerate(fds)]
    for number, fd in enumerate(copies):
        os.dup2(fd, number)
    os.closerange(3, 1024)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(  # noqa: SIM115
        2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
    )


def _name_after_rank() -> None:
    """Name the process after its rank for `ps`, which shows the fork server's environment."""
    if rank := os.environ.get("RANK"):
        _LIBC.prctl(_PR_SET_NAME, f"rank{rank}".encode())


def torch_threads() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _exit_code(command: Sequence[str]) -> int:
    """Run the command to its end, with what an interpreter does there, and return its exit code."""
    code = 0
    try:
        _run_main(command)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code & 0xFF


def _run_main(command: Sequence[str]) -> None:
    sys.modules["__main__"] = types.ModuleType("__main__")
    if command[0] == str(BD3_SCALE):
        from bd3_scale.cli import main

        sys.argv = list(command)
        sys.exit(main())
    kind, *rest = without_warnings(command[1:])
    if kind == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, str(Path(kind).parent.absolute()))
        runpy.run_path(kind, run_name="__main__")


def _can_meet_others(command: Sequence[str]) -> bool:
    """Return whether a fork can run `command`; a fork lacks the thread of gloo's loop, if one exists."""
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return "gloo_tcp_loop\n" not in threads or ALONE in command


class ForkingPopen(subprocess.Popen):
    """A process that forks this one where the program is Python, and otherwise starts as `Popen` does."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):  # type: ignore[no-untyped-def]
        command = [args] if isinstance(args, str | bytes | os.PathLike) else [os.fspath(word) for word in args]
        _, _, shell, *pipes, _, _, _, _, _, new_session, group = rest
        if shell or executable or pass_fds or not is_forkable(command) or not _can_meet_others(command):
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        stdin, _, _, stdout, _, stderr = pipes
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if new_session:
                os.setsid()
            if group is not None and group >= 0:
                os.setpgid(0, group)
            become(command, cwd=cwd, env=env, fds=[stdin, stdout, stderr], keep=preexec_fn)
        self._child_created = True
        self._close_pipe_fds(*pipes)
        return None
