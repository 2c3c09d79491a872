"""What a check has found: one line, and where something is wrong the command that mends it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a check ended."""

    PASS = "pass"  # noqa: S105 - no password
    WARN = "warn"
    """It works, but not as well as it could, or not for much longer."""
    FAIL = "fail"
    """It does not work, or a daemon would not start."""
    SKIP = "skip"
    """There is nothing to look at here; the text says why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    """What was looked at, as "pool.memory": stable, and the same for every device, tier or pool."""
    verdict: Verdict
    text: str
    """What was found, with figures and units."""
    fix: str = ""
    """What to type; only of WARN and FAIL, and never empty there."""

    def __post_init__(self) -> None:
        is_wrong = self.verdict in (Verdict.WARN, Verdict.FAIL)
        assert is_wrong == bool(self.fix), f"{self.name}: {self.verdict} with the fix {self.fix!r}"


def passed(name: str, text: str) -> Finding:
    """Report that all is well."""
    return Finding(name, Verdict.PASS, text)


def skipped(name: str, text: str) -> Finding:
    """Report that there is nothing to look at, and why."""
    return Finding(name, Verdict.SKIP, text)


def warned(name: str, text: str, fix: str) -> Finding:
    """Report what could be better."""
    return Finding(name, Verdict.WARN, text, fix)


def failed(name: str, text: str, fix: str) -> Finding:
    """Report what does not work."""
    return Finding(name, Verdict.FAIL, text, fix)


def worst(findings: Iterable[Finding]) -> Verdict:
    """Return the verdict of all together; SKIP counts for nothing."""
    seen = {finding.verdict for finding in findings}
    return next((verdict for verdict in (Verdict.FAIL, Verdict.WARN) if verdict in seen), Verdict.PASS)
