"""Define a finding of `bd3-scale doctor`: a value, its verdict, the rule that it was checked against, and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the table of `bd3-scale doctor`.

    Attributes:
        topic, name: what was looked at.
        value: what is there.
        verdict: with a warning, a run may be slower or less safe; with a problem, it does not start or does not last.
        rule: that the value was checked against; "" where there is none.
        fix: what a person should do; "" where the value is ok.
    """

    topic: str
    name: str
    value: str
    verdict: Verdict = "ok"
    rule: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        """Refuse a warning or a problem without a way out."""
        if self.verdict != "ok" and not self.fix:
            raise ValueError(f"the {self.verdict} {self.topic}: {self.name} names no fix")


def checked(
    topic: str, name: str, value: str, *, rule: str, fix: str, broken: bool, verdict: Verdict = "problem"
) -> Finding:
    """Return the finding of a value that was checked against a rule; `verdict` and `fix` count where it is broken."""
    return Finding(topic, name, value, verdict if broken else "ok", rule, fix if broken else "")


def has_problem(findings: Iterable[Finding]) -> bool:
    """Return whether a run would not start, or not last."""
    return any(finding.verdict == "problem" for finding in findings)
