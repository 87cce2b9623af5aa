"""Scores become comparisons: by hand on small files, and nothing that people scored is dropped silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppolite.data.candidates import comparisons, lines, read_candidates
from ppolite.data.readers import read_preferences
from ppolite.types import Preference, Prompt, Scored, UserError

P, Q = Prompt(({"role": "user", "content": "p"},)), Prompt(({"role": "user", "content": "q"},))


def test_every_two_answers_told_apart_by_hand() -> None:
    scored = [
        Scored(P, "a", 3),
        Scored(Q, "x", -1.5),
        Scored(P, "b", 1),
        Scored(P, "c", 3),
        Scored(P, "a", 0),  # the same answer again, scored otherwise: not to be compared with itself
        Scored(P, "d", None),
        Scored(P, "  ", 9),
        Scored(Q, "y", -1.0),
    ]
    made = [(p.prompt.last, p.chosen, p.rejected) for p in comparisons(scored, "round 1")]
    assert made == [("p", "a", "b"), ("p", "c", "b"), ("p", "b", "a"), ("p", "c", "a"), ("q", "y", "x")]
    assert {p.origin for p in comparisons(scored, "round 1")} == {"round 1"}


def test_the_scale_does_not_matter() -> None:
    draw = [2.0, 2.0, 7.0, 5.0, 1.0]
    one = [Scored(P, f"answer {i}", x) for i, x in enumerate(draw)]
    other = [Scored(P, f"answer {i}", 0.01 * x**3 - 40) for i, x in enumerate(draw)]
    assert comparisons(one, "") == comparisons(other, "")
    assert len(comparisons(one, "")) == 9  # ten pairs, one of them tied


def test_written_and_read_again(tmp_path: Path) -> None:
    made = [
        Preference(P, "很好", "bad", origin="round 2"),
        Preference(Q, "x", "y", margin=0.5, origin="reward.data"),
        Preference(Prompt(text="plain"), "x", "y", origin="round 2"),
    ]
    path = tmp_path / "c.jsonl"
    path.write_text(lines(made), encoding="utf-8")
    read, report = read_preferences(str(path), plain=True)
    assert not report.problems
    assert [(p.prompt.messages, p.prompt.text, p.chosen, p.rejected, p.margin, p.origin) for p in read] == [
        (p.prompt.messages, p.prompt.text, p.chosen, p.rejected, p.margin, p.origin) for p in made
    ]


def test_scores_that_are_there_and_not(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    rows = [
        {"prompt": "p", "response": "a", "score": 3},
        {"prompt": "p", "response": "b", "score": None},
        {"prompt": "p", "response": "", "score": ""},
        {"prompt": list(Q.messages), "response": "c", "score": "0.5"},
        {"prompt": "p", "response": "d"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    read = read_candidates(path)
    assert [row.score for row in read] == [3, None, None, 0.5, None]
    assert [row.response for row in read] == ["a", "b", "", "c", "d"]
    assert read[3].prompt.messages == Q.messages
    assert read_candidates(path, plain=True)[0].prompt.text == "p"


GOOD = '{"prompt": "p", "response": "a", "score": 1}\n\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "row 3: is not JSON"),
        ("[1]", "row 3: is a list, not an object"),
        ('{"response": "a"}', "row 3: has no 'prompt'; add it"),
        ('{"prompt": "p"}', "row 3: has no 'response'; add it"),
        ('{"prompt": "p", "response": 3}', "row 3: 'response' is 3; give text"),
        ('{"prompt": "p", "response": "a", "score": "high"}', "row 3: 'score' is 'high'; give a number"),
        ('{"prompt": "p", "response": "a", "score": NaN}', "row 3: 'score' is nan; give a finite number"),
    ],
)
def test_a_bad_row_stops_with_its_line(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(GOOD + line + "\n")
    with pytest.raises(UserError) as caught:
        read_candidates(path)
    assert f"{path} {said}" in str(caught.value)
