"""Start real servers, each as a process on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

COMMAND = [str(Path(sys.executable).with_name("bd3-scale")), "serve"]


@dataclass
class Server:
    process: subprocess.Popen
    url: str
    log: Path

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=20) as answer:
            return answer.read().decode()

    def meter(self, name: str) -> float:
        found = re.search(rf"^bd3_scale_{name} (.+)$", self.get("/metrics"), re.MULTILINE)
        assert found, name
        return float(found[1])

    def wait_for(self, name: str, value: float, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while self.meter(name) != value:
            assert time.monotonic() < deadline, (name, self.meter(name))
            time.sleep(0.05)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextmanager
def served(
    path: Path, *options: str, folder: Path, command: list[str] = COMMAND, **environment: str
) -> Iterator[Server]:
    log = folder / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, str(path), "--port", "0", *options],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "300"} | environment,
        )
    try:
        deadline = time.monotonic() + 90
        while not (found := re.search(r"at (http://\S+?):? ", log.read_text().replace("\n", " "))):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Server(process, found[1], log)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
