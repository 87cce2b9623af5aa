"""Candidates with scores become comparisons: which of two answers to one prompt was liked better.

A score is a number on somebody's scale: people differ in how freely they give a 9, one person drifts, and a
judge's −1..1 is another scale altogether. Within a prompt that does not matter, so this is all that is taken from
scores: every two different answers to a prompt with different scores make a row `prompt, chosen, rejected`. Rows
from many rounds and many hands may then stand in one file. (Ouyang et al. 2022, section 3.5, compare all answers
to a prompt in the same way.)

A candidate without words is left out, since readers take no empty answers.

    python -c "from ppolite.data.candidates import *; print(len(comparisons(read_candidates('c.jsonl'), '')))"
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from ppolite.data.row import Row, to_number
from ppolite.data.split import prompt_key
from ppolite.data.tables import RowError, read_rows
from ppolite.types import Preference, Scored, UserError

STAND_IN = "vader, a stand-in for people"
"""`scored_by` of candidates that the judge scored."""


def read_candidates(path: str | Path, *, plain: bool = False) -> list[Scored]:
    """All rows of a file that `ppolite sample` wrote, with the scores they have by now.

    Stricter than `read_scored`: what people took the trouble to score is not dropped over a slip of the pen.
    Raises UserError for the first row that cannot be read, with its line.
    """
    values, report = read_rows(str(path))
    for problem in report.problems:
        raise UserError(str(problem))
    made: list[Scored] = []
    for number, columns in values:
        row = Row(columns, {}, f"{path} row {number}")
        try:
            made.append(_candidate(row, plain))
        except RowError as bad:
            raise UserError(f"{row.where}: {bad.reason}; {bad.advice}") from None
    return made


def _candidate(row: Row, plain: bool) -> Scored:
    prompt = row.prompt(plain)
    score, response = row.get("score", None), row.get("response")
    if not (isinstance(response, str) and not response.strip()):
        response = row.answer("response", prompt)
    unrated = score is None or (isinstance(score, str) and not score.strip())
    return Scored(prompt, response, None if unrated else to_number(score, "score"))


def comparisons(scored: Sequence[Scored], origin: str) -> list[Preference]:
    """All pairs of different answers to one prompt whose scores differ; rows without a score make none."""
    by_prompt: dict[str, list[Scored]] = {}
    for row in scored:
        if row.score is not None and row.response.strip():
            by_prompt.setdefault(prompt_key(row.prompt), []).append(row)
    made: list[Preference] = []
    for rows in by_prompt.values():
        for a, b in combinations(rows, 2):
            assert a.score is not None
            assert b.score is not None
            if a.score != b.score and a.response != b.response:
                better, worse = (a, b) if a.score > b.score else (b, a)
                made.append(
                    Preference(better.prompt, better.response, worse.response, margin=0.0, origin=origin)
                )
    return made


def lines(preferences: Sequence[Preference]) -> str:
    """Comparisons as JSON Lines that `read_preferences` reads; margins only where there are any."""
    return "".join(json.dumps(_line(p), ensure_ascii=False) + "\n" for p in preferences)


def _line(preference: Preference) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": list(preference.prompt.messages) or preference.prompt.text,
        "chosen": preference.chosen,
        "rejected": preference.rejected,
        "origin": preference.origin,
    }
    return row | ({"margin": preference.margin} if preference.margin else {})
