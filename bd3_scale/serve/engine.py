"""Generate the requested texts in one thread: take them from a queue in order, and denoise as many together as fit.

With tensor parallelism every rank runs the same loop. Rank 0 has the queue, and broadcasts at each turn which texts
join and leave. The messages are JSON: a pickle from another process would be code to run.
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
from bd3_scale.generate.denoiser import Denoiser, sampling_policy
from bd3_scale.generate.draft import Draft
from bd3_scale.generate.writer import Writer
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.resilience.terminal import tell
from bd3_scale.serve.server_metrics import ServerMetrics

# Seconds between broadcasts without work: a rank that waits longer than its timeout counts the others as dead.
_IDLE_SECONDS = 5.0
_FIRST_ESTIMATE = 2.0  # seconds per text, until one was generated
# Errors of a plug-in's rule, or of too little memory. Which text caused it is unknown, so all texts of the batch fail;
# the engine goes on, since the next texts may succeed. Other errors end the engine.
_RECOVERABLE = (ValueError, RuntimeError, MemoryError, ArithmeticError, LookupError, TypeError, AttributeError)


class QueueFullError(Exception):
    """The queue is full; seconds: when a client should try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full: try again in {seconds} s")
        self.seconds = seconds


@dataclass(frozen=True)
class Text:
    """A requested text, see `Writer.request`; its values are JSON values, which rank 0 broadcasts."""

    prompt: list[int]
    sampling: SamplingConfig
    seed: int
    stop: tuple[str, ...] = ()
    alternatives: int | None = None

    @property
    def length(self) -> int:
        """Return the most tokens that the text may have, with its prompt."""
        return len(self.prompt) + self.sampling.max_new_tokens


@dataclass
class Job:
    """A text that a client waits for.

    listen: called in the engine's thread with the draft after each pass until its end, or once with an error message.
    began: when the text left the queue (`time.monotonic`).
    """

    text: Text
    listen: Callable[[Draft | str], None]
    began: float = 0.0


class Engine:
    """Generates requested texts with a model, in a thread.

    Args:
        slots: texts that are denoised together. waiting: most texts in the queue. cache_tokens: most tokens of a text
            in the cache; never more than the training's sequences had.

    Call `start`, then `submit` and `cancel` from any thread, then `stop`. Ranks other than 0 call `follow`.
    """

    def __init__(self, writer: Writer, *, slots: int, waiting: int, cache_tokens: int, metrics: ServerMetrics) -> None:
        size = writer.block_size
        self.writer, self.metrics = writer, metrics
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
        self._seconds = _FIRST_ESTIMATE
        self._denoiser = self._new_denoiser()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: str | None = None

    def holds(self, length: int) -> bool:
        """Return whether a text of `length` tokens can be generated: it fits the cache, or the window does."""
        slides = self.writer.context == self.capacity and self.writer.window(length) is not None
        return length <= self.capacity or slides

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def follow(self) -> None:
        """Run the loop on a rank other than 0 until rank 0 stops. Signals are ignored: rank 0 handles them."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        self._run()

    def stop(self) -> None:
        """End the thread; unfinished texts fail."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        self._thread.join()

    def check(self, sampling: SamplingConfig) -> None:
        """Raise ValueError if the rule does not allow this model's block size."""
        sampling_policy(sampling, self.writer.block_size)

    def submit(self, jobs: list[Job]) -> list[int]:
        """Put texts into the queue, all or none, and return their numbers.

        QueueFullError: there is no room now; ValueError: there is never room for so many; RuntimeError: the engine has
        ended.
        """
        if len(jobs) > (most := self._most_waiting + self._slots):
            raise ValueError(f"{len(jobs)} texts are requested, and this server takes {most} at once: request fewer")
        with self._condition:
            if self.failure is not None or self._stopping:
                raise RuntimeError(self.failure or "the server is stopping")
            waiting = len(self._waiting)
            room = self._most_waiting + self._slots - len(self._jobs) - waiting
            if len(jobs) > room:
                turns = (waiting + len(self._jobs)) / self._slots
                raise QueueFullError(max(1, round(turns * self._seconds)))
            numbers = list(range(self._count, self._count + len(jobs)))
            self._count += len(jobs)
            self._waiting.extend(zip(numbers, jobs, strict=True))
            self.metrics.waiting.set(len(self._waiting))
            self._condition.notify_all()
        return numbers

    def cancel(self, numbers: list[int]) -> None:
        """Stop generating these texts; texts that have ended are not affected."""
        with self._condition:
            cancelled = set(numbers)
            self._waiting = deque((number, job) for number, job in self._waiting if number not in cancelled)
            self._cancelled |= cancelled & self._jobs.keys()
            self.metrics.waiting.set(len(self._waiting))
            self._condition.notify_all()

    def _new_denoiser(self) -> Denoiser:
        return Denoiser(self.writer.model, block_size=self.writer.block_size, slots=self._slots, capacity=self.capacity)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP keeps this number per thread
        has_ranks = dist.is_initialized() and dist.get_world_size() > 1
        try:
            while True:
                orders = on_rank_zero(self._orders) if has_ranks else self._orders()
                if orders["stop"]:
                    return
                self._turn(orders)
        except BaseException as error:
            with self._condition:  # no text is submitted from here on
                self.failure = f"the engine ended: {error or type(error).__name__}"
            raise
        finally:
            for job in [*self._jobs.values(), *(job for _, job in self._waiting)]:
                job.listen(self.failure or "the server stopped before the text was complete")

    def _orders(self) -> dict[str, Any]:
        """Return which texts join and leave; without work, wait for a text."""
        with self._condition:
            if not self._jobs:
                self._condition.wait_for(lambda: self._waiting or self._stopping, _IDLE_SECONDS)
            # A text may have ended since it was cancelled.
            leaving = sorted(self._cancelled & self._drafts.keys())
            self._cancelled = set()
            free = self._denoiser.free + len(leaving)
            joining = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._jobs |= dict(joining)
            for _, job in joining:
                job.began = time.monotonic()
            self.metrics.waiting.set(len(self._waiting))
            texts = [[number, {**dataclasses.asdict(job.text), "stop": list(job.text.stop)}] for number, job in joining]
            return {"stop": self._stopping, "leave": leaving, "join": texts}

    def _turn(self, orders: dict[str, Any]) -> None:
        """Let texts join and leave, read a part of a prompt, run one pass, and notify the listeners."""
        try:
            self._remove(orders["leave"])
            for number, values in orders["join"]:
                self._join(number, Text(**{**values, "sampling": SamplingConfig(**values["sampling"])}))
            if self._denoiser.reads:
                self._denoiser.read(briefly=bool(self._denoiser.active))
            if any(draft.sample is None for draft in self._denoiser.active):
                self._advance()
            self._notify()
            return
        except _RECOVERABLE as error:
            failure = f"generation failed: {error or type(error).__name__}"
            tell("".join(traceback.format_exception(error)).rstrip())
        # Outside the handler: there the traceback refers to the frames that hold the cache, and there may be no memory
        # for an old and a new cache.
        del self._denoiser
        for number in [*self._drafts, *(number for number, _ in orders["join"])]:
            self._end(number, failure)
        self._denoiser = self._new_denoiser()

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
        passes = sum(draft.nfe for draft in active)
        self._denoiser.advance()
        self.metrics.passes.inc(sum(draft.nfe for draft in active) - passes)
        self.metrics.forwards.inc()
        self.metrics.seconds.inc(time.perf_counter() - began)

    def _notify(self) -> None:
        """Call the listeners with their drafts; remove texts that have ended."""
        active = self._denoiser.active
        for draft in active:
            if (job := self._jobs.get(draft.index)) is not None:
                job.listen(draft)
        ended = [draft for draft in active if draft.sample is not None]
        self._denoiser.leave(ended)
        for draft in ended:
            self._end(draft.index)
        self.metrics.active.set(len(self._drafts))
        self.metrics.cached.set(sum(len(draft.tokens) - draft.unread for draft in self._drafts.values()))

    def _remove(self, numbers: list[int]) -> None:
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
            self.metrics.tokens.inc(len(draft.sample.tokens) or draft.request.prompt.count(self._mask_id))
            # A moving average of the last eight texts or so, for `Retry-After`.
            self._seconds += (time.monotonic() - job.began - self._seconds) / 8
