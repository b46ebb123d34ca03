"""Do the tasks of a preparation: each becomes a folder that appears complete or not at all."""

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
# The most workers that one reading process can keep busy.
MAX_FED_WORKERS = 16

# Called with the bytes of the sources that were done since the last call.
Progress = Callable[[int], object]
# Encodes the documents of a reader, whose share is held out; yields them with the bytes read so far.
Encode = Callable[[DocumentReader, float], Iterator[tuple[Sequence[EncodedDocument], int]]]


def folder_of(number: int) -> str:
    """Return the name of a task's folder."""
    return f"{number:05}"


def splits_of(holdout: float) -> list[SplitName]:
    """Return the splits of documents of which the share `holdout` is held out."""
    exists: dict[SplitName, bool] = {"train": holdout < 1, "validation": holdout > 0}
    return [name for name, is_there in exists.items() if is_there]


@dataclass(frozen=True)
class TaskWriter:
    """Writes tasks into `folder`. `readers`: each with the share of its documents that is held out."""

    folder: Path
    data: Manifest
    encoder: Encoder
    readers: Sequence[tuple[DocumentReader, float]]

    def write(self, number: int, task: Task, encode: Encode, progress: Progress) -> None:
        """Do a task. If another process has finished it meanwhile, that equal result is kept."""
        out = self.folder / folder_of(number)
        try:
            with new_folder(out) as folder:
                self._fill(folder, task, encode, progress)
        except FileExistsError:
            if not out.is_dir():
                raise

    def encode(self, reader: DocumentReader, holdout: float) -> Iterator[tuple[Sequence[EncodedDocument], int]]:
        """Encode the documents of a reader in this process."""
        encoder = replace(self.encoder, holdout=holdout)
        for texts, position in chunks(reader):
            yield encoder(texts), position

    def _fill(self, folder: Path, task: Task, encode: Encode, progress: Progress) -> None:
        reader, holdout = self.readers[task.reader]
        reader = reader.only(task.parts)
        writers = {name: SplitWriter(folder, name, self.data) for name in splits_of(holdout)}
        done = 0
        for documents, position in encode(reader, holdout):
            for document in documents:
                writers[document.split].add(document)
            progress(position - done)
            done = position
        progress(task.num_bytes - done)
        splits = {name: writer.finish() for name, writer in writers.items()}
        (folder / RESULT_FILE).write_text(Result(left_out=reader.left_out, splits=splits).model_dump_json())


def write_tasks(writer: TaskWriter, tasks: Mapping[int, Task], workers: int, progress: Progress) -> None:
    """Do tasks, by their numbers, in `workers` processes.

    With many tasks each process does whole tasks; with few, all processes encode chunks of one task after the other.

    Raises:
        ValueError: a source cannot be read, or a process was killed.
    """
    if workers == 1:
        for number, task in tasks.items():
            writer.write(number, task, writer.encode, progress)
        return
    with _pool(writer, workers) as (pool, shared):
        if len(tasks) < min(workers, MAX_FED_WORKERS):
            for number, task in tasks.items():
                writer.write(number, task, partial(_encode_with, pool, workers), progress)
        else:
            # The largest first, so that no long task starts last.
            ordered = sorted(tasks.items(), key=lambda item: item[1].num_bytes, reverse=True)
            for _ in _as_done(pool, ordered, workers):
                progress(shared.new_bytes())


@dataclass
class _Shared:
    """State that the processes share: the bytes that are done, and whether to stop."""

    num_bytes: Synchronized[int]
    stop: Event
    reported: int = 0

    def new_bytes(self) -> int:
        """Return the bytes that were done since the last call."""
        before, self.reported = self.reported, self.num_bytes.value
        return self.reported - before

    def add(self, num_bytes: int) -> None:
        """Add bytes that are done. Raises InterruptedError to end this task if another one failed."""
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
            "a process of the preparation was killed (by the system, if memory ran out): repeat the command, which "
            "does the unfinished tasks, perhaps with fewer --workers"
        ) from error
    finally:
        shared.stop.set()
        pool.shutdown(cancel_futures=True)


def _encode_with(
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
    """Yield now and then until all tasks are done."""
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
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already use all cores
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
    writer.write(number, task, writer.encode, shared.add)
