"""Errors in OpenAI's form: status, message, and which parameter it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RefusedError(Exception):
    """State why a request is not answered.

    param: the field that it is about. code: a word that programs look for.
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
        """Return OpenAI's object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def of_validation(errors: Sequence[Any]) -> RefusedError:
    """Return the first error that pydantic found in a body, in words."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return RefusedError(f"the body is no JSON ({first.get('ctx', {}).get('error', first['msg'])})")
    # What the body is declared as stands first, and names of a union's members behind the field.
    place = [part for part in first["loc"] if part != "body"]
    field = next((part for part in place if isinstance(part, str)), None)
    said = str(first["msg"]).removeprefix("Value error, ")
    where = ".".join(str(part) for part in place if not isinstance(part, str) or ("[" not in part and "(" not in part))
    return RefusedError(f"{where}: {said}" if where else said, param=field)
