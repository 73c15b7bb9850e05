"""What a check found, how bad it is and what to do: the sanity suite and the doctor speak this."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Dict, Iterable, List

LEVELS = ("ok", "skip", "warn", "fail")  # from good to bad


@dataclass(frozen=True)
class Finding:
    """One result.

    Attributes:
        name: of what was checked.
        level: one of `LEVELS`; skip: it could not be checked here, and nothing is wrong with that.
        text: what was seen.
        advice: what is probably wrong and what to do; empty if nothing is.
    """

    name: str
    level: str
    text: str
    advice: str = ""

    def to_json(self) -> Dict[str, Any]:
        """Return the finding as plain values."""
        return asdict(self)


def worst(findings: Iterable[Finding]) -> str:
    """The worst level; "ok" of no findings."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def lines(findings: Iterable[Finding], colour: bool = False) -> List[str]:
    """Format findings as text, one or two lines each; the second says what to do."""
    tints = {"ok": "32", "skip": "90", "warn": "33", "fail": "31"}
    text_lines = []
    for finding in findings:
        level = "{:4s}".format(finding.level)
        if colour:
            level = "\x1b[{}m{}\x1b[0m".format(tints[finding.level], level)
        text_lines.append("{}  {:22s} {}".format(level, finding.name, finding.text))
        if finding.advice:
            text_lines.append("{}-> {}".format(" " * 6, finding.advice))
    return text_lines
