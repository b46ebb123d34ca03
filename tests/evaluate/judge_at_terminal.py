"""Open judges at a terminal that answers every question with y: `python -m … SOUND FOLDER …`; print the results.

SOUND is opened first, in this process, so that its imports are done for all others.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

from bd3_scale.evaluate.generative import Judge

PATIENCE_S = 60


def open_judge(folder: Path) -> None:
    try:
        said = {"nats": Judge(folder).nats("The quick brown fox")[0]}
    except (ValueError, OSError) as error:
        said = {"error": str(error)}
    print("\n" + json.dumps(said), flush=True)


def at_terminal(folder: Path) -> str:
    """Return what a process prints at its terminal until it ends."""
    pid, terminal = pty.fork()
    if pid == 0:
        code = 1
        try:
            open_judge(folder)
            code = 0
        finally:
            os._exit(code)
    said, end = b"", time.monotonic() + PATIENCE_S
    with contextlib.suppress(OSError):  # the terminal ends with the process
        while time.monotonic() < end:
            if not select.select([terminal], [], [], 0.2)[0]:
                continue
            said += os.read(terminal, 1 << 16)
            if said.rstrip().endswith(b"[y/N]"):
                os.write(terminal, b"y\n")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(terminal)
    return said.decode()


if __name__ == "__main__":
    Judge(Path(sys.argv[1]))
    print(json.dumps([at_terminal(Path(folder)) for folder in sys.argv[2:]]))
