"""Patience with a remote that is away: some failures pass and are tried again, others a person must mend at once."""

from __future__ import annotations

import errno
import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_delay,
    wait_exponential,
    wait_random,
)

from bd3_scale.resilience.readers import in_one_line, read_regular
from bd3_scale.resilience.terminal import tell

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
TELL_SECONDS = 60.0
# What comes cut or changed so many times lies there like that.
TRIES_OF_DAMAGED = 3

_NOT_FOUND, _DENIED = {404, 410}, {401, 403}
# Of S3, which says 400 with some of them.
_DENIED_CODES = {"AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
# Of a client that cannot begin, or has no credentials that it could show: botocore, google-auth, Azure, OCI, paramiko.
_OWN_FAULTS = {
    *("ConfigNotFound", "InvalidConfigError", "InvalidRegionError", "NoCredentialsError", "NoRegionError"),
    *("ParamValidationError", "PartialCredentialsError", "ProfileNotFound", "UnsupportedSignatureVersionError"),
    *("DefaultCredentialsError", "ClientAuthenticationError", "ConfigFileNotFound", "InvalidConfig"),
    *("AuthenticationException", "BadHostKeyException"),
}
_LOCAL_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EISDIR, errno.ENOTDIR}


class DamagedError(ValueError):
    """What came is not what the index or its format say."""


class _Shared:
    """Times of one outage, in seconds of the monotonic clock, 0 for none: a rank shares them with the loader workers
    that it forks, so that they give up together and one of them tells.
    """

    def __init__(self) -> None:
        self._times = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.float64)

    def failed(self) -> None:
        self._times[0] = self._times[0] or time.monotonic()

    def came(self) -> None:
        self._times[:2] = 0

    def seconds(self) -> float:
        """Return for how long nothing has come."""
        return time.monotonic() - self._times[0] if self._times[0] else 0.0

    def is_to_be_told(self) -> bool:
        """Return whether nobody has told for a while; whoever asks then tells."""
        now = time.monotonic()
        if self._times[1] and now - self._times[1] < TELL_SECONDS:
            return False
        self._times[1] = now
        return True


_AWAY = _Shared()


def patiently(action: Callable[[], T], place: str, minutes: float) -> T:
    """Return what `action` does, which reads `place` of a remote; where it fails, again with growing pauses.

    minutes: for which nothing may come. The first failure is told, and then the outage once a minute, in one line.

    Raises:
        FileNotFoundError, PermissionError, ValueError, at once: the store does not have it or does not give it, the
        client cannot begin, or what comes is damaged, `TRIES_OF_DAMAGED` times. ConnectionError: nothing came.
    """
    damaged = 0

    def may_pass(error: BaseException) -> bool:
        nonlocal damaged
        damaged += isinstance(error, DamagedError)
        return isinstance(error, Exception) and damaged < TRIES_OF_DAMAGED and what_to_mend(error, place) is None

    def failed(state: RetryCallState) -> None:
        _AWAY.failed()
        assert state.outcome is not None
        if _AWAY.is_to_be_told():
            left = max(0.0, 60 * minutes - _AWAY.seconds())
            tell(
                f"waiting for data: {place} ({_said(state.outcome.exception())}); nothing has come for "
                f"{_AWAY.seconds():.0f} s, tried again for {left / 60:.0f} more minutes (data.retry_minutes)"
            )

    retrying = Retrying(
        retry=retry_if_exception(may_pass),
        wait=wait_exponential(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS) + wait_random(0, FIRST_PAUSE_SECONDS),
        stop=lambda state: stop_after_delay(60 * minutes)(state) or _AWAY.seconds() > 60 * minutes,
        before_sleep=failed,
        reraise=True,
    )
    try:
        found = retrying(action)
    except Exception as error:
        if isinstance(error, DamagedError):
            raise
        if told := what_to_mend(error, place):
            raise told from error
        raise ConnectionError(
            f"{place} has not come for {minutes:g} minutes (data.retry_minutes): {_said(error)}; start the "
            f"command again once it is there; a run goes on from its last checkpoint"
        ) from error
    _AWAY.came()
    return found


def fetch(place: str, local: Path, parse: Callable[[bytes], T], limit: int, minutes: float, downloader: Any) -> T:
    """Return `parse` of the content of `place`, in a remote, which is left in `local`; see `patiently`.

    `parse` raises ValueError where the content is damaged; one of more than `limit` bytes is. downloader: streaming's,
    for that remote.
    """

    def once() -> T:
        local.unlink(missing_ok=True)
        try:
            downloader.download(place, str(local))
        except BaseException:
            downloader.clean_up()
            raise
        check_came(place, local)
        try:
            return parse(read_regular(local, limit))
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{place} is damaged: {in_one_line(error)}") from error

    return patiently(once, place, minutes)


def check_came(place: str, local: Path) -> None:
    """Raise ConnectionError if a download of `place` has left nothing: streaming's of Google's S3 hides errors."""
    if not local.exists():
        raise ConnectionError(f"{place} was not answered")


def what_to_mend(error: BaseException, place: str) -> OSError | ValueError | None:
    """Return what a person must mend before `place` can come, or None where another try may help.

    error: as streaming, the clients that it calls, or a file system raise it.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    status, code = _answer(error)
    if "LocalEntryNotFoundError" in names:  # of the Hugging Face hub: it did not answer
        return None
    if status in _NOT_FOUND or (status is None and isinstance(error, FileNotFoundError)):
        return FileNotFoundError(
            f"{place} is not there{_told(status)}: put it back, or correct data.remote; a store may say this of what "
            f"these credentials may not list"
        )
    if status in _DENIED or code in _DENIED_CODES or isinstance(error, PermissionError):
        return PermissionError(
            f"{place} may not be read{_told(status)}: it is not there, or credentials are wrong, expired or without "
            f"that right"
        )
    if isinstance(error, RecursionError):  # streaming calls itself where S3 answers 400
        return ValueError(f"{place} is refused (400): check credentials, region and S3_ENDPOINT_URL")
    if isinstance(error, OSError) and error.errno in _LOCAL_FAULTS:
        return error
    # Streaming's and botocore's words about a remote or an endpoint that is none, or a library that is missing.
    if names & _OWN_FAULTS or type(error) in (ValueError, ImportError, ModuleNotFoundError):
        return ValueError(
            f"{place} cannot be read: {_said(error)}; correct data.remote, or credentials and their files"
        )
    return None


def _answer(error: BaseException) -> tuple[int | None, str]:
    """Return the HTTP status that a store has answered with, and its name of the error, where the client says them."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None, str(response.get("Error", {}).get("Code", ""))
    # requests, Azure, OCI, Google
    found = (
        getattr(response, "status_code", None),
        *(getattr(error, n, None) for n in ("status_code", "status", "code")),
    )
    return next((int(value) for value in found if isinstance(value, int)), None), ""


def _told(status: int | None) -> str:
    return "" if status is None else f" ({status})"


def _said(error: BaseException | None) -> str:
    assert error is not None
    return in_one_line(error)
