"""Retry reads of remote storage: some failures pass with time, others need a person and are raised at once."""

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
# A file that arrives damaged so often is damaged at its source.
MAX_DAMAGED_TRIES = 3

_NOT_FOUND, _DENIED = {404, 410}, {401, 403}
# Error codes of S3, some of which come with status 400.
_DENIED_CODES = {"AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
# Errors of clients without valid settings or credentials: botocore, google-auth, Azure, OCI, paramiko.
_CLIENT_ERRORS = {
    *("ConfigNotFound", "InvalidConfigError", "InvalidRegionError", "NoCredentialsError", "NoRegionError"),
    *("ParamValidationError", "PartialCredentialsError", "ProfileNotFound", "UnsupportedSignatureVersionError"),
    *("DefaultCredentialsError", "ClientAuthenticationError", "ConfigFileNotFound", "InvalidConfig"),
    *("AuthenticationException", "BadHostKeyException"),
}
_LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EISDIR, errno.ENOTDIR}


class DamagedError(ValueError):
    """Error: the bytes that were read do not match their index or format."""


class _Outage:
    """Times of an outage, in seconds of the monotonic clock, 0 for none.

    They lie in memory that a rank shares with the loader workers that it forks: so all give up together, and only one
    of them prints.
    """

    def __init__(self) -> None:
        self._times = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.float64)

    def start(self) -> None:
        """Note a failure; the first one starts the outage."""
        self._times[0] = self._times[0] or time.monotonic()

    def end(self) -> None:
        """Note a success."""
        self._times[:2] = 0

    def seconds(self) -> float:
        """Return how long the outage has lasted."""
        return time.monotonic() - self._times[0] if self._times[0] else 0.0

    def take_message_turn(self) -> bool:
        """Return whether the caller is to print a message: none was printed for `TELL_SECONDS`."""
        now = time.monotonic()
        if self._times[1] and now - self._times[1] < TELL_SECONDS:
            return False
        self._times[1] = now
        return True


_OUTAGE = _Outage()


def with_retries(action: Callable[[], T], place: str, minutes: float) -> T:
    """Return the result of `action`, which reads `place` of a remote; retry failures with growing pauses.

    minutes: how long nothing may come. The first failure is printed, and then the outage once a minute, in one line.

    Raises:
        FileNotFoundError, PermissionError, ValueError: at once if the store does not have or does not give the file,
            or the client cannot start; after `MAX_DAMAGED_TRIES` if the content is damaged.
        ConnectionError: nothing came in time.
    """
    damaged = 0

    def is_transient(error: BaseException) -> bool:
        nonlocal damaged
        damaged += isinstance(error, DamagedError)
        return isinstance(error, Exception) and damaged < MAX_DAMAGED_TRIES and permanent_error(error, place) is None

    def report(state: RetryCallState) -> None:
        _OUTAGE.start()
        assert state.outcome is not None
        if _OUTAGE.take_message_turn():
            left = max(0.0, 60 * minutes - _OUTAGE.seconds())
            tell(
                f"waiting for data: {place} ({_message(state.outcome.exception())}); nothing has come for "
                f"{_OUTAGE.seconds():.0f} s, retrying for {left / 60:.0f} more minutes (data.retry_minutes)"
            )

    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait_exponential(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS) + wait_random(0, FIRST_PAUSE_SECONDS),
        stop=lambda state: stop_after_delay(60 * minutes)(state) or _OUTAGE.seconds() > 60 * minutes,
        before_sleep=report,
        reraise=True,
    )
    try:
        result = retrying(action)
    except Exception as error:
        if isinstance(error, DamagedError):
            raise
        if permanent := permanent_error(error, place):
            raise permanent from error
        raise ConnectionError(
            f"{place} has not come for {minutes:g} minutes (data.retry_minutes): {_message(error)}; repeat the "
            f"command when it is available; a run continues from its last checkpoint"
        ) from error
    _OUTAGE.end()
    return result


def fetch(place: str, local: Path, parse: Callable[[bytes], T], limit: int, minutes: float, downloader: Any) -> T:
    """Return `parse` of the content of `place` on a remote, which is also saved as `local`; see `with_retries`.

    `parse` raises ValueError if the content is damaged; content above `limit` bytes counts as damaged, too.
    downloader: streaming's downloader for that remote.
    """

    def once() -> T:
        local.unlink(missing_ok=True)
        try:
            downloader.download(place, str(local))
        except BaseException:
            downloader.clean_up()
            raise
        check_downloaded(place, local)
        try:
            return parse(read_regular(local, limit))
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{place} is damaged: {in_one_line(error)}") from error

    return with_retries(once, place, minutes)


def check_downloaded(place: str, local: Path) -> None:
    """Raise ConnectionError if a download left no file: streaming's client for Google Storage hides its errors."""
    if not local.exists():
        raise ConnectionError(f"{place} was not answered")


def permanent_error(error: BaseException, place: str) -> OSError | ValueError | None:
    """Return the error for a person if a retry of `place` cannot help, or None if it may.

    error: as raised by streaming, by the clients that it calls, or by a file system.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    status, code = _answer(error)
    if "LocalEntryNotFoundError" in names:  # the Hugging Face hub did not answer
        return None
    if status in _NOT_FOUND or (status is None and isinstance(error, FileNotFoundError)):
        return FileNotFoundError(
            f"{place} is not there{_status(status)}: put it back, or correct data.remote; a store may also say so "
            f"if these credentials may not list the folder"
        )
    if status in _DENIED or code in _DENIED_CODES or isinstance(error, PermissionError):
        return PermissionError(
            f"{place} may not be read{_status(status)}: it is not there, or the credentials are wrong, expired or lack "
            f"the permission"
        )
    if isinstance(error, RecursionError):  # streaming calls itself without end if S3 answers 400
        return ValueError(f"{place} is refused (400): check credentials, region and S3_ENDPOINT_URL")
    if isinstance(error, OSError) and error.errno in _LOCAL_ERRORS:
        return error
    # Streaming and botocore raise these exact classes for an invalid remote or endpoint, and for a missing library.
    if names & _CLIENT_ERRORS or type(error) in (ValueError, ImportError, ModuleNotFoundError):
        return ValueError(
            f"{place} cannot be read: {_message(error)}; correct data.remote, or the credentials and their files"
        )
    return None


def _answer(error: BaseException) -> tuple[int | None, str]:
    """Return the HTTP status of a store's answer and its error code, if the client reports them."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None, str(response.get("Error", {}).get("Code", ""))
    # requests, Azure, OCI, Google
    statuses = (
        getattr(response, "status_code", None),
        *(getattr(error, n, None) for n in ("status_code", "status", "code")),
    )
    return next((int(value) for value in statuses if isinstance(value, int)), None), ""


def _status(status: int | None) -> str:
    return "" if status is None else f" ({status})"


def _message(error: BaseException | None) -> str:
    assert error is not None
    return in_one_line(error)
