"""Report errors in OpenAI's form: status, message, and the parameter that is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RefusedError(Exception):
    """The reason why a request is not answered.

    param: the field that is wrong. code: a word that programs can check.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def validation_error(errors: Sequence[Any]) -> RefusedError:
    """Return the first error that pydantic found in a body, as a message for people."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return RefusedError(f"the body is not JSON ({first.get('ctx', {}).get('error', first['msg'])})")
    # FastAPI puts "body" first, and pydantic puts names of a union's members, such as "list[str]", behind the field.
    location = [part for part in first["loc"] if part != "body"]
    field = next((part for part in location if isinstance(part, str)), None)
    problem = str(first["msg"]).removeprefix("Value error, ")
    path = ".".join(
        str(part) for part in location if not isinstance(part, str) or ("[" not in part and "(" not in part)
    )
    return RefusedError(f"{path}: {problem}" if path else problem, param=field)
