"""What `bd3-scale doctor` finds: a value, whether it will do, the rule it was held to, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the table. A warning costs time or may matter; with a problem a run does not start or does not last.

    `rule` and `advice` are empty where nothing was asked of the value.
    """

    topic: str
    name: str
    value: str
    verdict: Verdict = "ok"
    rule: str = ""
    advice: str = ""


def held_to(
    topic: str, name: str, value: str, *, rule: str, advice: str, broken: bool, verdict: Verdict = "problem"
) -> Finding:
    """Return the finding of a value that was held to a rule; `verdict` and `advice` where the rule is broken."""
    return Finding(topic, name, value, verdict if broken else "ok", rule, advice if broken else "")


def has_problem(findings: Iterable[Finding]) -> bool:
    """Tell whether a run would not start, or not last."""
    return any(finding.verdict == "problem" for finding in findings)
