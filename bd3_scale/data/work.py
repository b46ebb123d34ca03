"""Doing the tasks of a preparation: each becomes a folder that appears complete or not at all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

from bd3_scale.data.encode import EncodedDocument, Encoder, chunks
from bd3_scale.data.manifest import Manifest, SplitName
from bd3_scale.data.sources import DocumentReader
from bd3_scale.data.split_writer import SplitWriter
from bd3_scale.data.tasks import RESULT_FILE, Result, Task
from bd3_scale.registry import import_plugins
from bd3_scale.resilience.files import new_folder

POLL_SECONDS = 0.2
# Which one process that reads and writes can feed with chunks to encode.
FED_WORKERS = 16

# Told how many bytes of the sources have been done since it was told the last time.
Tell = Callable[[int], object]
# The documents that a reader gives, of which a share is held out, and the bytes read so far.
Encoded = Callable[[DocumentReader, float], Iterator[tuple[Sequence[EncodedDocument], int]]]


def folder_of(number: int) -> str:
    """Return the name of a task's folder."""
    return f"{number:05}"


def splits_of(holdout: float) -> list[SplitName]:
    """Return the splits that documents go to of which this share is held out."""
    there: dict[SplitName, bool] = {"train": holdout < 1, "validation": holdout > 0}
    return [name for name, is_there in there.items() if is_there]


@dataclass(frozen=True)
class TaskWriter:
    """Writes tasks into `folder`; `readers`, each with the share that is held out of its documents."""

    folder: Path
    data: Manifest
    encoder: Encoder
    readers: Sequence[tuple[DocumentReader, float]]

    def write(self, number: int, task: Task, encoded: Encoded, tell: Tell) -> None:
        """Do a task. What somebody else has done in the meantime is the same, and is kept."""
        out = self.folder / folder_of(number)
        try:
            with new_folder(out) as folder:
                self._fill(folder, task, encoded, tell)
        except FileExistsError:
            if not out.is_dir():
                raise

    def encoded(self, reader: DocumentReader, holdout: float) -> Iterator[tuple[Sequence[EncodedDocument], int]]:
        """Encode in this process."""
        encoder = replace(self.encoder, holdout=holdout)
        for texts, position in chunks(reader):
            yield encoder(texts), position

    def _fill(self, folder: Path, task: Task, encoded: Encoded, tell: Tell) -> None:
        reader, holdout = self.readers[task.reader]
        reader = reader.only(task.parts)
        writers = {name: SplitWriter(folder, name, self.data) for name in splits_of(holdout)}
        done = 0
        for documents, position in encoded(reader, holdout):
            for document in documents:
                writers[document.split].add(document)
            tell(position - done)
            done = position
        tell(task.num_bytes - done)
        splits = {name: writer.finish() for name, writer in writers.items()}
        (folder / RESULT_FILE).write_text(Result(left_out=reader.left_out, splits=splits).model_dump_json())


def write_tasks(writer: TaskWriter, tasks: Mapping[int, Task], workers: int, tell: Tell) -> None:
    """Do tasks, by their numbers, in `workers` processes: each does whole tasks; of few, all encode one's chunks.

    Raises:
        ValueError: a source cannot be read, or a process was killed.
    """
    if workers == 1:
        for number, task in tasks.items():
            writer.write(number, task, writer.encoded, tell)
        return
    with _pool(writer, workers) as (pool, shared):
        if len(tasks) < min(workers, FED_WORKERS):
            for number, task in tasks.items():
                writer.write(number, task, partial(_encoded_by, pool, workers), tell)
        else:
            # The largest first, so that none is begun when the others end.
            ordered = sorted(tasks.items(), key=lambda item: item[1].num_bytes, reverse=True)
            for _ in _as_done(pool, ordered, workers):
                tell(shared.new_bytes())


@dataclass
class _Shared:
    """What the processes tell each other: bytes that are done, and that they are to stop."""

    num_bytes: Synchronized[int]
    stop: Event
    told: int = 0

    def new_bytes(self) -> int:
        told, self.told = self.told, self.num_bytes.value
        return self.told - told

    def add(self, num_bytes: int) -> None:
        with self.num_bytes.get_lock():
            self.num_bytes.value += num_bytes
        if self.stop.is_set():
            raise InterruptedError("another task failed")


@contextmanager
def _pool(writer: TaskWriter, workers: int) -> Iterator[tuple[ProcessPoolExecutor, _Shared]]:
    # Spawned, because forking a process that has threads (the progress bar, torch) can deadlock.
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context.Value("q", 0), context.Event())
    modules = sorted(set().union(*(reader.modules for reader, _ in writer.readers)) - {"__main__"})
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(modules, writer, shared))
    try:
        yield pool, shared
    except BrokenProcessPool as error:
        raise ValueError(
            "a process of the preparation was killed (by the system, where memory ran out): repeat the command, which "
            "does what is missing, perhaps with fewer --workers"
        ) from error
    finally:
        shared.stop.set()
        pool.shutdown(cancel_futures=True)


def _encoded_by(
    pool: ProcessPoolExecutor, workers: int, reader: DocumentReader, holdout: float
) -> Iterator[tuple[Sequence[EncodedDocument], int]]:
    pending: deque[tuple[Future[Sequence[EncodedDocument]], int]] = deque()
    for texts, position in chunks(reader):
        pending.append((pool.submit(_encode_in_worker, texts, holdout), position))
        if len(pending) > 2 * workers:
            future, done = pending.popleft()
            yield future.result(), done
    for future, done in pending:
        yield future.result(), done


def _as_done(pool: ProcessPoolExecutor, tasks: Iterable[tuple[int, Task]], workers: int) -> Iterator[None]:
    """Yield every now and then until all are done."""
    waiting: set[Future[None]] = set()
    for number, task in tasks:
        waiting.add(pool.submit(_write_in_worker, number, task))
        while len(waiting) >= 2 * workers:
            waiting = _still_waiting(waiting)
            yield
    while waiting:
        waiting = _still_waiting(waiting)
        yield


def _still_waiting(waiting: set[Future[None]]) -> set[Future[None]]:
    done, still = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
    for future in done:
        future.result()
    return still


_worker: tuple[TaskWriter, _Shared]


def _start_worker(modules: Sequence[str], writer: TaskWriter, shared: _Shared) -> None:
    global _worker
    _worker = writer, shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    import_plugins(modules)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str], holdout: float) -> list[EncodedDocument]:
    return replace(_worker[0].encoder, holdout=holdout)(texts)


def _write_in_worker(number: int, task: Task) -> None:
    writer, shared = _worker
    writer.write(number, task, writer.encoded, shared.add)
