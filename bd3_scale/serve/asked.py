"""A request as texts, on their way through the engine to the client that waits for them."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from fastapi import Request

from bd3_scale.serve.answers import Answer, Event, Failure, Listener, Tells
from bd3_scale.serve.engine import Engine, Job, QueueFullError, Text
from bd3_scale.serve.errors import RefusedError

_GLANCE = 0.5  # seconds between looks whether a client is still there


@dataclass(frozen=True)
class Asked:
    """Hold a request as texts, of which those behind one another are choices of one prompt.

    given: tokens of each prompt as a client counts them; gap: see `Listener`.
    """

    texts: list[Text]
    given: list[int]
    answer: Answer
    gap: int | None = None


class Run:
    """Put the texts of one request into the queue, and take them out of it when nobody wants them any more.

    tells: see there. RefusedError: there is no room in the queue, or the engine has ended.
    """

    def __init__(self, engine: Engine, asked: Asked, request: Request, seconds: float, tells: Tells) -> None:
        self.asked, self._engine, self._request, self._seconds = asked, engine, request, seconds
        self.gone = False
        loop = asyncio.get_running_loop()
        self._events = events = asyncio.Queue[Event]()

        def send(event: Event) -> None:  # without self, which the engine would keep alive, see below
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        jobs = [
            Job(text, Listener(engine.writer, text, choice, send, engine.meters, given, tells, asked.gap))
            for choice, (text, given) in enumerate(zip(asked.texts, asked.given, strict=True))
        ]
        try:
            self._numbers = engine.submit(jobs)
        except QueueFullError as error:
            raise RefusedError(str(error), 429, headers={"Retry-After": str(error.seconds)}) from error
        except ValueError as error:
            raise RefusedError(str(error)) from error
        except RuntimeError as error:
            raise RefusedError(str(error), 503) from error
        # A client may have left before anybody asks for events, whose end cancels. In the loop, since garbage is
        # collected in any thread, perhaps while the engine holds its lock.
        numbers = self._numbers

        def forgotten() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(engine.cancel, numbers)

        weakref.finalize(self, forgotten)

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield what comes until all texts are at their end, one has failed, or the client has left.

        RefusedError: it takes too long.
        """
        open_texts, looked = len(self.asked.texts), time.monotonic()
        deadline = looked + self._seconds
        try:
            while open_texts:
                event = await self._next()
                now = time.monotonic()
                if now > deadline:
                    raise RefusedError(f"the answer takes longer than {self._seconds:g} s: ask for less", 504)
                if now - looked > _GLANCE / 2:
                    if await self._request.is_disconnected():
                        self.gone = True
                        return
                    looked = now
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
            return await asyncio.wait_for(self._events.get(), _GLANCE)
        except TimeoutError:
            return None
