"""The thread that writes: it takes texts from a queue, in their order, and denoises as many together as have room.

With tensor parallelism every rank runs the loop; rank 0 has the queue, and tells the others at each turn who joins and
who leaves, as JSON.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.denoiser import Denoiser, law
from bd3_scale.generate.draft import Draft
from bd3_scale.generate.writer import Writer
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.resilience.terminal import tell
from bd3_scale.serve.meters import Meters

# Without work the ranks still meet this often, in seconds: one that waits longer takes the others for dead.
_IDLE = 5.0
_SECONDS_AT_FIRST = 2.0  # of a text, before one was written
# A rule of a plug-in, or memory: whose text it was is not known, and the next ones may go well.
_OF_A_TEXT = (ValueError, RuntimeError, MemoryError, ArithmeticError, LookupError, TypeError, AttributeError)


class QueueFullError(Exception):
    """State that no more texts may wait; seconds: after which one may be asked for again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"as many texts wait as may wait: ask again in {seconds} s")
        self.seconds = seconds


@dataclass(frozen=True)
class Text:
    """State which text is asked for, see `Writer.request`, in values of JSON, which ranks tell each other."""

    prompt: list[int]
    sampling: SamplingConfig
    seed: int
    stop: tuple[str, ...] = ()
    alternatives: int | None = None

    @property
    def length(self) -> int:
        """Return its tokens, at the most."""
        return len(self.prompt) + self.sampling.max_new_tokens


@dataclass
class Job:
    """Hold a text that somebody waits for.

    listen: told in the engine's thread of the draft after each pass, to its end, or once why there will be none.
    began: when the text left the queue.
    """

    text: Text
    listen: Callable[[Draft | str], None]
    began: float = 0.0


class Engine:
    """Write with a model what is asked for, in a thread.

    Args:
        slots: texts at once. waiting: texts that wait for one, at the most. cache_tokens: of a text that the cache
            holds, at the most; none holds more than the training's sequences.

    Use `start`, then `submit` and `cancel` from any thread, then `stop`. Ranks other than 0 call `follow`.
    """

    def __init__(self, writer: Writer, *, slots: int, waiting: int, cache_tokens: int, meters: Meters) -> None:
        size = writer.block_size
        self.writer, self.meters = writer, meters
        self.capacity = -(-min(writer.context, cache_tokens) // size) * size
        self._slots, self._most_waiting = slots, waiting
        self._mask_id = writer.model.vocabulary.mask_id
        self._threads = torch.get_num_threads()
        self._condition = threading.Condition()
        self._waiting: deque[tuple[int, Job]] = deque()
        self._cancelled: set[int] = set()
        self._stopping = False
        self._count = 0
        self._jobs: dict[int, Job] = {}
        self._drafts: dict[int, Draft] = {}
        self._seconds = _SECONDS_AT_FIRST
        self._denoiser = self._fresh()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: str | None = None

    def holds(self, length: int) -> bool:
        """Return whether a text of so many tokens can be written: in the cache, or with a window as long as that."""
        slides = self.writer.context == self.capacity and self.writer.window(length) is not None
        return length <= self.capacity or slides

    def start(self) -> None:
        """Begin to write what is asked for."""
        self._thread.start()

    def follow(self) -> None:
        """Do as rank 0 says, until it stops; signals are rank 0's to answer."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        self._run()

    def stop(self) -> None:
        """End the thread; what is not written yet fails."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        self._thread.join()

    def check(self, sampling: SamplingConfig) -> None:
        """Raise ValueError if the rule is none for blocks of this model."""
        law(sampling, self.writer.block_size)

    def submit(self, jobs: list[Job]) -> list[int]:
        """Put texts into the queue, all or none, and return their numbers.

        QueueFullError: there is no room now; ValueError: there never is for so many; RuntimeError: it has ended.
        """
        if len(jobs) > (most := self._most_waiting + self._slots):
            raise ValueError(f"{len(jobs)} texts are asked for, and {most} at once are the most here: ask for fewer")
        with self._condition:
            if self.failure is not None or self._stopping:
                raise RuntimeError(self.failure or "the server is stopping")
            there = len(self._waiting)
            room = self._most_waiting + self._slots - len(self._jobs) - there
            if len(jobs) > room:
                turns = (there + len(self._jobs)) / self._slots
                raise QueueFullError(max(1, round(turns * self._seconds)))
            numbers = list(range(self._count, self._count + len(jobs)))
            self._count += len(jobs)
            self._waiting.extend(zip(numbers, jobs, strict=True))
            self.meters.waiting.set(len(self._waiting))
            self._condition.notify_all()
        return numbers

    def cancel(self, numbers: list[int]) -> None:
        """Write these texts no further; what is at its end is left alone."""
        with self._condition:
            gone = set(numbers)
            self._waiting = deque((number, job) for number, job in self._waiting if number not in gone)
            self._cancelled |= gone & self._jobs.keys()
            self.meters.waiting.set(len(self._waiting))
            self._condition.notify_all()

    def _fresh(self) -> Denoiser:
        return Denoiser(self.writer.model, block_size=self.writer.block_size, slots=self._slots, capacity=self.capacity)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # each thread of Python has a number of its own
        several = dist.is_initialized() and dist.get_world_size() > 1
        try:
            while True:
                orders = on_rank_zero(self._orders) if several else self._orders()
                if orders["stop"]:
                    return
                self._turn(orders)
        except BaseException as error:
            with self._condition:  # no text is submitted from here on
                self.failure = f"the engine ended: {error or type(error).__name__}"
            raise
        finally:
            for job in [*self._jobs.values(), *(job for _, job in self._waiting)]:
                job.listen(self.failure or "the server stopped before the text was written")

    def _orders(self) -> dict[str, Any]:
        """Return who joins and who leaves; wait for somebody where there is nothing to do."""
        with self._condition:
            if not self._jobs:
                self._condition.wait_for(lambda: self._waiting or self._stopping, _IDLE)
            # Some reached their end meanwhile.
            leaving = sorted(self._cancelled & self._drafts.keys())
            self._cancelled = set()
            free = self._denoiser.free + len(leaving)
            joining = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._jobs |= dict(joining)
            for _, job in joining:
                job.began = time.monotonic()
            self.meters.waiting.set(len(self._waiting))
            texts = [[number, {**dataclasses.asdict(job.text), "stop": list(job.text.stop)}] for number, job in joining]
            return {"stop": self._stopping, "leave": leaving, "join": texts}

    def _turn(self, orders: dict[str, Any]) -> None:
        """Let texts join and leave, read some of a prompt, run one pass and tell who listens."""
        try:
            self._forget(orders["leave"])
            for number, values in orders["join"]:
                self._join(number, Text(**{**values, "sampling": SamplingConfig(**values["sampling"])}))
            if self._denoiser.reads:
                self._denoiser.read(briefly=bool(self._denoiser.active))
            if any(draft.sample is None for draft in self._denoiser.active):
                self._advance()
            self._tell()
            return
        except _OF_A_TEXT as error:
            failure = f"writing failed: {error or type(error).__name__}"
            tell("".join(traceback.format_exception(error)).rstrip())
        # Not in the handler, whose traceback holds the cache, while there may be no room for two.
        del self._denoiser
        for number in [*self._drafts, *(number for number, _ in orders["join"])]:
            self._end(number, failure)
        self._denoiser = self._fresh()

    def _join(self, number: int, text: Text) -> None:
        writer = self.writer
        request = writer.request(
            text.prompt,
            text.sampling,
            seed=text.seed,
            stop=text.stop,
            window=writer.window(text.length),
            alternatives=text.alternatives,
        )
        draft = Draft.of(number, request, writer.block_size, writer.model.vocabulary.mask_id)
        self._drafts[number] = draft
        self._denoiser.join(draft)

    def _advance(self) -> None:
        active = self._denoiser.active
        began = time.perf_counter()
        masks = sum(draft.nfe for draft in active)
        self._denoiser.advance()
        self.meters.passes.inc(sum(draft.nfe for draft in active) - masks)
        self.meters.forwards.inc()
        self.meters.seconds.inc(time.perf_counter() - began)

    def _tell(self) -> None:
        """Tell listeners of their drafts; texts at their end leave."""
        active = self._denoiser.active
        for draft in active:
            if (job := self._jobs.get(draft.index)) is not None:
                job.listen(draft)
        ended = [draft for draft in active if draft.sample is not None]
        self._denoiser.leave(ended)
        for draft in ended:
            self._end(draft.index)
        self.meters.active.set(len(self._drafts))
        self.meters.cached.set(sum(len(draft.tokens) - draft.unread for draft in self._drafts.values()))

    def _forget(self, numbers: list[int]) -> None:
        self._denoiser.leave([self._drafts[number] for number in numbers if number in self._drafts])
        for number in numbers:
            self._end(number)

    def _end(self, number: int, failure: str | None = None) -> None:
        draft = self._drafts.pop(number, None)
        with self._condition:
            job = self._jobs.pop(number, None)
        if job is None:
            return
        if failure is not None:
            job.listen(failure)
        elif draft is not None and draft.sample is not None:
            self.meters.tokens.inc(len(draft.sample.tokens) or draft.request.prompt.count(self._mask_id))
            self._seconds += (time.monotonic() - job.began - self._seconds) / 8
