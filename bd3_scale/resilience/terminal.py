"""Make foreign text safe to print on a terminal; needs the standard library alone."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import traceback
import warnings
from types import TracebackType

# Characters that move the cursor, set colours or titles, make the terminal answer, or reverse the order of letters:
# control characters except newline and tab, line separators, bidirectional overrides; and surrogates, which no encoding
# can write.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    r"""Return `text` with control characters as visible escapes such as `\x1b`; newline and tab stay."""
    return _UNSAFE.sub(lambda match: ascii(match.group())[1:-1], text)


def tell(text: str) -> None:
    """Print a line to stderr, cleaned. If stderr cannot be written, the line is lost without an error."""
    with contextlib.suppress(OSError):
        print(clean(text), file=sys.stderr, flush=True)


def clean_diagnostics() -> None:
    """Clean what Python itself prints to stderr from now on: log records, warnings, tracebacks."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_CleanFormatter())
    warnings.formatwarning = _clean_warning
    sys.excepthook = _tell_traceback


class _CleanFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return clean(super().format(record))


_format_warning = warnings.formatwarning


def _clean_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return clean(_format_warning(message, category, filename, lineno, line))


def _tell_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    tell("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))
