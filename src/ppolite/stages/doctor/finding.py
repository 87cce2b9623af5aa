"""What a check has found: a verdict, a figure, and a sentence saying what to change.

| verdict | |
|---|---|
| ok | |
| warn | odd enough to look at; some runs want it so |
| fail | the run would surely not do what its recipe says |
| skipped | something that the check needs is not there; the figure says what |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail", "skipped"]
RANK: tuple[Verdict, ...] = ("skipped", "ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    name: str
    verdict: Verdict
    figure: str
    remedy: str = ""


def graded(name: str, figure: str, remedy: str, *, warn: bool = False, fail: bool = False) -> Finding:
    """The worst verdict that applies; without one all is well, and the remedy is not told."""
    if not (warn or fail):
        return Finding(name, "ok", figure)
    return Finding(name, "fail" if fail else "warn", figure, remedy)


def skipped(name: str, why: str) -> Finding:
    return Finding(name, "skipped", why)


def worst(findings: Iterable[Finding]) -> list[Finding]:
    """Of findings of one name the worst, since several stages make the same check; those of one kind together."""
    told: dict[str, Finding] = {}
    for finding in findings:
        before = told.get(finding.name)
        if before is None or RANK.index(finding.verdict) > RANK.index(before.verdict):
            told[finding.name] = finding
    kinds = list(dict.fromkeys(map(_kind, told)))
    return sorted(told.values(), key=lambda finding: kinds.index(_kind(finding.name)))


def _kind(name: str) -> str:
    return name.partition("/")[0]
