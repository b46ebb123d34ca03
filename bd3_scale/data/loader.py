"""Processes that make batches ahead of time and send them through pipes, which need no room in /dev/shm."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from queue import Queue
from typing import Generic, TypeVar

from bd3_scale.resilience.terminal import tell

T = TypeVar("T")

_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
_LOOK_SECONDS = 1.0
_JOIN_SECONDS = 10.0


class Workers(Iterator[T], Generic[T]):
    """An iterator over what `items(w, count)` yields for w = 0 to `count` − 1, in turns, w in a process of its own.

    A process makes up to `ahead` items before they are asked for, besides what a pipe holds (64 KiB). It ends with
    this object, and at most a second after the process that made it, however that ended. Signals that a scheduler sends
    to every process of a job do not end it: the rank decides, after its last checkpoint.

    `next` raises ValueError and OSError as `items` does, RuntimeError with the traceback for any other error, and
    ConnectionError where a process was killed, as by the kernel where memory runs out.
    """

    def __init__(self, items: Callable[[int, int], Iterator[T]], count: int, ahead: int) -> None:
        # Forked: what `items` refers to need not be pickled, and its memory is shared.
        context = multiprocessing.get_context("fork")
        workers: list[tuple[ForkProcess, Connection]] = []
        # A worker begins with them held back: one that came in its first milliseconds would end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            for number in range(count):
                reader, writer = context.Pipe(duplex=False)
                inherited = [reader, *(pipe for _, pipe in workers)]
                arguments = (items, number, count, ahead, writer, inherited, os.getpid())
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                writer.close()  # or the pipe would stay open when the process ends
                workers.append((process, reader))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._turns = itertools.cycle(workers)
        weakref.finalize(self, _end, workers)

    def __next__(self) -> T:
        process, pipe = next(self._turns)
        try:
            item = pipe.recv()
        except EOFError:
            raise ConnectionError(_how_it_ended(process)) from None
        if isinstance(item, Exception):
            raise item
        return item


def _end(workers: list[tuple[ForkProcess, Connection]]) -> None:
    for process, _ in workers:
        process.kill()
    for process, pipe in workers:
        process.join()
        pipe.close()


def _how_it_ended(process: ForkProcess) -> str:
    process.join(_JOIN_SECONDS)
    code = process.exitcode
    if code is None or code >= 0:
        how = f"ended with exit code {code}"
    elif code == -signal.SIGKILL:
        why = "as the kernel does where memory runs out: lower data.num_workers or give more memory"
        how = f"was killed by SIGKILL, {why}"
    else:
        how = f"was killed by {signal.Signals(-code).name}"
    return f"the loader worker {process.pid} {how}; the run goes on from its last checkpoint when it is started again"


def _work(
    items: Callable[[int, int], Iterator[T]],
    number: int,
    count: int,
    ahead: int,
    pipe: Connection,
    inherited: list[Connection],
    rank: int,
) -> None:
    for reader in inherited:
        reader.close()
    threading.Thread(target=_end_with, args=(rank,), daemon=True).start()
    made: Queue[T | Exception] = Queue(ahead)
    threading.Thread(target=_send, args=(made, pipe), daemon=True).start()
    try:
        for item in items(number, count):
            made.put(item)
    except ValueError as error:
        made.put(ValueError(str(error)))  # some kinds cannot be pickled
    except OSError as error:
        made.put(error)
    except Exception:  # noqa: BLE001 - raised again by the rank
        made.put(RuntimeError(f"the loader worker {number} failed:\n{traceback.format_exc()}"))
    made.join()


def _send(made: Queue[T | Exception], pipe: Connection) -> None:
    try:
        while True:
            pipe.send(made.get())
            made.task_done()
    except BrokenPipeError:
        os._exit(0)  # the rank is gone
    except Exception:  # noqa: BLE001 - the rank would wait for ever for what cannot be sent
        tell(traceback.format_exc())
        os._exit(1)


def _end_with(rank: int) -> None:
    while os.getppid() == rank:
        received = signal.sigtimedwait(_SIGNALS, _LOOK_SECONDS)
        if received is not None and received.si_signo == signal.SIGTERM and received.si_pid == rank:
            break
    os._exit(0)
