"""What reading a source found: how many rows, and for each unusable one where, why and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Problem:
    """One row that cannot be used. Rows count from 1; in a text file this is the line of a record."""

    source: str
    row: int
    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.source} row {self.row}: {self.reason}; {self.advice}"


@dataclass
class Report:
    """The account of one reading: `rows == used + len(problems)`, so that nothing is dropped silently."""

    source: str
    rows: int = 0
    used: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was done to all rows alike, e.g. that prompts read twice are kept once."""

    def add(self, row: int, reason: str, advice: str) -> None:
        self.problems.append(Problem(self.source, row, reason, advice))

    def lines(self, most: int = 5) -> list[str]:
        """The sentences a person should see: the count, then at most `most` rows of each kind of advice."""
        lines = [f"{self.source}: {self.used:,} of {self.rows:,} rows used", *self.notes]
        kinds: dict[str, list[Problem]] = {}
        for problem in self.problems:
            kinds.setdefault(problem.advice, []).append(problem)
        for same in kinds.values():
            lines += [str(problem) for problem in same[:most]]
            if len(same) > most:
                lines.append(f"{self.source}: and {len(same) - most:,} more rows of this kind")
        return lines
