"""What every request passes before it is read: who may ask, how large a body may be; and what is counted of answers."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bd3_scale.serve.errors import RefusedError
from bd3_scale.serve.meters import Meters

_PASSED_OVER = 16  # times the largest body
_OPEN = ("/", "/health")
# A page of another site may have its name point here; whoever asks under that name is not meant.
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Gate:
    """Let requests through to the application, or refuse them.

    key: which they must bear; None: nobody but this machine can ask, and none is needed.
    """

    app: ASGIApp
    key: str | None
    most_bytes: int
    meters: Meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        size, status = 0, 500

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most_bytes:
                # Of this kind, since FastAPI takes any other for JSON that is broken.
                raise HTTPException(413, self._too_large)
            return message

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope, headers)
            await self.app(scope, limited, counted)
        except RefusedError as refusal:
            await self._pass_over(receive)
            await refusal.response(scope, receive, counted)
        finally:
            # Those that clients may make up would be counted for ever.
            path = getattr(scope.get("route"), "path", "other")
            self.meters.requests.labels(path, str(status)).inc()

    def _check(self, scope: Scope, headers: dict[bytes, str]) -> None:
        """Raise RefusedError where the request is not to be read."""
        if self.key is None:
            if (host := _host_name(headers.get(b"host", ""))) not in _LOOPBACK:
                raise RefusedError(
                    f"the host {host!r} is not this machine's own name: ask localhost, or start the server with a key",
                    403,
                )
        elif scope["path"] not in _OPEN:
            scheme, _, given = headers.get(b"authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
                raise RefusedError(
                    "no API key, or not the server's: send `Authorization: Bearer KEY`", 401, code="invalid_api_key"
                )
        if scope["method"] == "POST" and not headers.get(b"content-type", "").lower().startswith("application/json"):
            raise RefusedError("the body must be JSON: send `Content-Type: application/json`", 415)
        if (length := headers.get(b"content-length", "")).isdigit() and int(length) > self.most_bytes:
            raise RefusedError(self._too_large, 413)

    async def _pass_over(self, receive: Receive) -> None:
        """Read what is left of a body, if it is not very large: a client that still writes would not see the answer."""
        left = _PASSED_OVER * self.most_bytes
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body"):
                return

    @property
    def _too_large(self) -> str:
        return f"the body is larger than {self.most_bytes:,} bytes: send less text"


def _host_name(header: str) -> str:
    """Return the host of `HOST:PORT` or `[ADDRESS]:PORT`."""
    return (header.partition("]")[0] + "]" if header.startswith("[") else header.partition(":")[0]).lower()
