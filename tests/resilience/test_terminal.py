"""Test that text cannot control a terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bd3_scale.resilience.terminal import clean


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\x08\x7f", r"a\rb\x08\x7f"),
        ("\x9b31m\x85\xa0", "\\x9b31m\\x85\xa0"),
        ("\u202eabc\u202c\u2066x\u2069\u2028\u2029", r"\u202eabc\u202c\u2066x\u2069\u2028\u2029"),
        (b"bytes\xff.txt".decode(errors="surrogateescape"), r"bytes\udcff.txt"),
        ("lines\n\tand tabs", "lines\n\tand tabs"),
        ("é 日本 עברית ‏ 👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 e\u0301 [bold] \\x1b", "é 日本 עברית ‏ 👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 e\u0301 [bold] \\x1b"),
    ],
)
def test_controls_become_escapes_and_words_of_all_scripts_stay(text: str, shown: str) -> None:
    assert clean(text) == shown
    assert clean(shown) == shown


def test_warnings_log_records_and_tracebacks_are_cleaned() -> None:
    program = r"""
import logging, warnings
from bd3_scale.resilience.terminal import clean_diagnostics, tell
clean_diagnostics()
logging.getLogger("any").warning("log of %s", "\x1b[2J")
warnings.warn("warning of \x1b[2J")
tell("line of \x1b[2J")
raise ValueError("error of \x1b[2J")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "\x1b" not in done.stderr
    for line in (
        r"log of \x1b[2J",
        r"UserWarning: warning of \x1b[2J",
        r"line of \x1b[2J",
        r"ValueError: error of \x1b[2J",
    ):
        assert f"{line}\n" in done.stderr
