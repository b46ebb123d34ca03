"""Check every request before its body is read (key, host, size of the body), and count the responses."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bd3_scale.serve.errors import RefusedError
from bd3_scale.serve.server_metrics import ServerMetrics

_MOST_DISCARDED = 16  # times the largest body
_WITHOUT_KEY = ("/", "/health")
# Host headers that are accepted without a key. This stops DNS rebinding: a page of another site lets its own name
# resolve to 127.0.0.1, and the browser then sends requests here under that name.
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Gate:
    """Middleware that passes requests to the application, or refuses them.

    key: the key that requests must send; None: the server listens to this machine alone and needs none.
    """

    app: ASGIApp
    key: str | None
    most_bytes: int
    metrics: ServerMetrics

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
                # FastAPI turns any other exception that is raised while it reads a body into "broken JSON" (400).
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
            await self._discard_body(receive)
            await refusal.response(scope, receive, counted)
        finally:
            # Counted by route and not by path: clients could create any number of labels, which are kept for ever.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()

    def _check(self, scope: Scope, headers: dict[bytes, str]) -> None:
        """Raise RefusedError if the request must not be read."""
        if self.key is None:
            if (host := _host_name(headers.get(b"host", ""))) not in _LOOPBACK:
                raise RefusedError(
                    f"the host {host!r} is not a name of this machine: use localhost, or start the server with a key",
                    403,
                )
        elif scope["path"] not in _WITHOUT_KEY:
            scheme, _, given = headers.get(b"authorization", "").partition(" ")
            # A comparison that takes equal time for any wrong key does not reveal its first characters.
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
                raise RefusedError(
                    "the API key is missing or wrong: send `Authorization: Bearer KEY`", 401, code="invalid_api_key"
                )
        if scope["method"] == "POST" and not headers.get(b"content-type", "").lower().startswith("application/json"):
            raise RefusedError("the body must be JSON: send `Content-Type: application/json`", 415)
        if (length := headers.get(b"content-length", "")).isdigit() and int(length) > self.most_bytes:
            raise RefusedError(self._too_large, 413)

    async def _discard_body(self, receive: Receive) -> None:
        """Read and discard the rest of a body unless it is very large: many clients read no response while they
        send."""
        left = _MOST_DISCARDED * self.most_bytes
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
