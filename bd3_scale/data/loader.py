"""Make batches ahead of time in worker processes, sent through pipes: unlike tensors, they need no room in /dev/shm."""

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
    """An iterator over what `items(w, count)` yields for w = 0 to `count` − 1, in turn; w runs in its own process.

    A process makes up to `ahead` items in advance, besides what a pipe holds (64 KiB). It ends with this object, and
    at most a second after its parent, however that ended. Signals that a scheduler sends to every process of a job do
    not end it: the rank still needs batches until its last checkpoint.

    `next` raises the ValueError or OSError of `items`, RuntimeError with the traceback for any other error, and
    ConnectionError if a process was killed, as the kernel does when memory runs out.
    """

    def __init__(self, items: Callable[[int, int], Iterator[T]], count: int, ahead: int) -> None:
        # Forked: `items` need not be picklable, and its memory is shared.
        context = multiprocessing.get_context("fork")
        workers: list[tuple[ForkProcess, Connection]] = []
        # Blocked until the worker handles them: a signal in its first milliseconds would end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            for number in range(count):
                reader, writer = context.Pipe(duplex=False)
                inherited = [reader, *(pipe for _, pipe in workers)]
                arguments = (items, number, count, ahead, writer, inherited, os.getpid())
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                writer.close()  # otherwise the pipe would stay open after the worker's end, and `recv` would hang
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
            raise ConnectionError(_ending(process)) from None
        if isinstance(item, Exception):
            raise item
        return item


def _end(workers: list[tuple[ForkProcess, Connection]]) -> None:
    for process, _ in workers:
        process.kill()
    for process, pipe in workers:
        process.join()
        pipe.close()


def _ending(process: ForkProcess) -> str:
    process.join(_JOIN_SECONDS)
    code = process.exitcode
    if code is None or code >= 0:
        how = f"ended with exit code {code}"
    elif code == -signal.SIGKILL:
        why = "as the kernel does when memory runs out: lower data.num_workers or give more memory"
        how = f"was killed by SIGKILL, {why}"
    else:
        how = f"was killed by {signal.Signals(-code).name}"
    return f"the loader worker {process.pid} {how}; restart the run, it continues from its last checkpoint"


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
        made.put(ValueError(str(error)))  # some subclasses cannot be pickled
    except OSError as error:
        made.put(error)
    except Exception:  # noqa: BLE001 - the rank raises it again
        made.put(RuntimeError(f"the loader worker {number} failed:\n{traceback.format_exc()}"))
    made.join()


def _send(made: Queue[T | Exception], pipe: Connection) -> None:
    try:
        while True:
            pipe.send(made.get())
            made.task_done()
    except BrokenPipeError:
        os._exit(0)  # the rank is gone
    except Exception:  # noqa: BLE001 - an item that cannot be sent would leave the rank waiting for ever
        tell(traceback.format_exc())
        os._exit(1)


def _end_with(rank: int) -> None:
    """End this process with its parent, or when the parent sends SIGTERM; other signals are taken and ignored."""
    while os.getppid() == rank:
        received = signal.sigtimedwait(_SIGNALS, _LOOK_SECONDS)
        if received is not None and received.si_signo == signal.SIGTERM and received.si_pid == rank:
            break
    os._exit(0)
