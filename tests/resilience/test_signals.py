"""Test real signals to real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from bd3_scale.resilience.signals import StopRequest, StopRequestedError

pytestmark = pytest.mark.launch

LOOP = """
import time
from bd3_scale.resilience.signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    try:
        while stop.signal is None or LINGER:
            if stop.signal is not None:
                print(stop.signal.name, flush=True)
            time.sleep(0.02)
        print(stop.signal.name, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
print("saved", flush=True)
"""


def start(linger: bool) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP.replace("LINGER", str(linger))], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_loop_and_the_rest_still_runs(number: signal.Signals) -> None:
    with start(linger=False) as process:
        process.send_signal(number)
        assert process.communicate(timeout=20)[0] == f"{number.name}\nsaved\n"
        assert process.returncode == 0


def test_only_a_second_sigint_interrupts_and_the_first_signal_is_the_one_named() -> None:
    with start(linger=True) as process:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
            assert process.stdout is not None
            assert process.stdout.readline() == "SIGUSR1\n"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        lines = process.communicate(timeout=20)[0].splitlines()
        assert lines[-2:] == ["interrupted", "saved"]


def test_a_hangup_that_is_ignored_at_the_start_stays_so() -> None:
    program = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{LOOP.replace('LINGER', 'False')}"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20)[0] == "SIGTERM\nsaved\n"


def test_handlers_come_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest() as stop:
        assert all(signal.getsignal(n) != b for n, b in zip(numbers, before, strict=True))
        signal.raise_signal(signal.SIGUSR1)
    assert stop.signal is signal.SIGUSR1
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_ends_a_wait_that_it_may_end_and_no_other() -> None:
    def asked(number: signal.Signals) -> None:
        signal.raise_signal(number)
        time.sleep(20)

    with StopRequest() as stop:
        with stop.interrupts_wait():
            time.sleep(0.01)
        began = time.monotonic()
        with pytest.raises(StopRequestedError), stop.interrupts_wait():
            asked(signal.SIGTERM)
        # It was handled; one that comes later waits for the next wait.
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(StopRequestedError), stop.interrupts_wait():
            time.sleep(20)
        assert time.monotonic() - began < 10
        assert stop.signal is signal.SIGTERM
