"""Run a request's texts through the engine and yield their events to the client that waits for them."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from fastapi import Request

from bd3_scale.serve.answers import Answer, Event, Failure, Granularity, Listener
from bd3_scale.serve.engine import Engine, Job, QueueFullError, Text
from bd3_scale.serve.errors import RefusedError

_POLL_SECONDS = 0.5  # between checks whether the client is still connected


@dataclass(frozen=True)
class TextRequest:
    """The texts of one HTTP request; the choices of a prompt follow one another.

    given: number of tokens of each text's prompt, without a suffix; gap: see `Listener`.
    """

    texts: list[Text]
    given: list[int]
    answer: Answer
    gap: int | None = None


class Run:
    """Submits the texts of one request to the engine's queue, and cancels them when their client has left.

    RefusedError: the queue is full, or the engine has ended.
    """

    def __init__(
        self, engine: Engine, texts: TextRequest, request: Request, seconds: float, granularity: Granularity
    ) -> None:
        self.texts, self._engine, self._request, self._seconds = texts, engine, request, seconds
        self.client_left = False
        loop = asyncio.get_running_loop()
        self._events = events = asyncio.Queue[Event]()

        # Called in the engine's thread. It must not refer to `self`: the engine's jobs would then keep this object
        # alive, and the finaliser below would never run.
        def send(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        jobs = [
            Job(text, Listener(engine.writer, text, choice, send, engine.metrics, given, granularity, texts.gap))
            for choice, (text, given) in enumerate(zip(texts.texts, texts.given, strict=True))
        ]
        try:
            self._numbers = engine.submit(jobs)
        except QueueFullError as error:
            raise RefusedError(str(error), 429, headers={"Retry-After": str(error.seconds)}) from error
        except ValueError as error:
            raise RefusedError(str(error)) from error
        except RuntimeError as error:
            raise RefusedError(str(error), 503) from error
        # If the client leaves before `events` is iterated, its `finally` never runs; then this finaliser cancels. It
        # calls the event loop and not the engine: garbage is collected in any thread, perhaps while the engine holds
        # its lock.
        numbers = self._numbers

        def cancel() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(engine.cancel, numbers)

        weakref.finalize(self, cancel)

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield events until all texts have ended, one has failed, or the client has left.

        RefusedError: the time limit has passed.
        """
        open_texts, checked = len(self.texts.texts), time.monotonic()
        deadline = checked + self._seconds
        try:
            while open_texts:
                event = await self._next()
                now = time.monotonic()
                if now > deadline:
                    raise RefusedError(
                        f"the answer takes longer than {self._seconds:g} s: request fewer tokens or texts", 504
                    )
                if now - checked > _POLL_SECONDS / 2:
                    if await self._request.is_disconnected():
                        self.client_left = True
                        return
                    checked = now
                if event is None:
                    continue
                yield event
                if isinstance(event, Failure):
                    return
                open_texts -= event.stopped_by is not None
        finally:
            self._engine.cancel(self._numbers)

    async def _next(self) -> Event | None:
        try:
            return await asyncio.wait_for(self._events.get(), _POLL_SECONDS)
        except TimeoutError:
            return None
