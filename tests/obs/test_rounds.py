"""Rounds side by side: whose number each is, and nothing of the models' text becomes markup."""

import io
import json

import pytest
from rich.console import Console

from ppolite.obs.rounds import is_iterated, rounds_table, write_rounds_report
from ppolite.types import UserError

EVIL = '<script>alert("x")</script>[bold]\x1b[31m'
RESULT = {
    "rounds": 2,
    "evaluation": {"prompts": 64, "judge": "vader", "samples": 1},
    "scored_by": "vader, a stand-in for people",
    "taught_by": "judge",
    "policies": [
        {"name": "SFT", "score": -0.5, "judge": 0.1, "length": 20.0, "distinct2": 0.9, "candidates_score": 0.12},
        {
            "name": "round 1", "score": 0.25, "score_gain_ci95": [0.5, 1.0], "judge": 0.3,
            "judge_gain_ci95": [0.1, 0.3], "length": 21.0, "distinct2": 0.8,
            "kl_ref_seq": 2.5, "own_score": [0.0, 1.5], "rm_right": [0.75, 40],
            "candidates_score": 0.28,
        },
        {
            "name": "round 2", "score": 1.25, "score_gain_ci95": [0.8, 1.2], "judge": 0.5,
            "judge_gain_ci95": [-0.1, 0.3], "length": 22.0, "distinct2": 0.7,
            "kl_ref_seq": 4.5, "own_score": [-0.5, 1.25], "rm_right": None,
        },
    ],
    "samples": [{"prompt": EVIL, "answers": [EVIL, "很好", "b"]}],
}  # fmt: skip


def table(result):
    out = io.StringIO()
    Console(file=out, width=200).print(rounds_table(result))
    return out.getvalue()


@pytest.fixture
def run(tmp_path):
    (tmp_path / "rounds.json").write_text(json.dumps(RESULT))
    return tmp_path


def cells(text, label):
    """The figures of the row that begins with `label`, in the terminal's table."""
    row = next(line for line in text.splitlines() if label in line)
    return [cell.strip() for cell in row.split("│")[2:-1]]


def test_every_number_stands_where_it_belongs():
    text = table(RESULT)
    assert cells(text, "score above the SFT model's") == ["0", "+0.75", "+1.75"]
    assert cells(text, "KL to the SFT model") == ["0", "2.50", "4.50"]
    assert cells(text, "not comparable") == ["–", "+1.50", "+1.75"]
    assert cells(text, "right on held-out") == ["–", "75.0% of 40", "–"]
    assert cells(text, "mean score given") == ["+0.12", "+0.28", "–"]
    assert "+0.80 … +1.20" in text
    assert "the last round was trained against it" in text
    assert "64 prompts; candidates scored by vader, a stand-in for people" in text


def test_a_judge_that_gave_the_scores_is_no_witness(run):
    page = write_rounds_report(run).read_text(encoding="utf-8")
    for text in (table(RESULT), page):
        assert "judge (taught the reward models: no independent witness)" in text
        assert "by vader, a stand-in for people" in text
    text = table(RESULT | {"scored_by": "people", "taught_by": "people"})
    assert "judge (independent)" in text
    assert "stand-in" not in text
    assert "judge" not in table(RESULT | {"policies": [{"name": "SFT", "score": 1.0}], "samples": []})


def test_text_stays_text_and_rounds_are_linked(run):
    raw = write_rounds_report(run).read_text(encoding="utf-8")
    assert "<script>" not in raw
    assert "\x1b" not in raw
    assert "很好" in raw
    assert 'href="round-2/report.html"' in raw
    assert "[bold]" in table(RESULT)
    assert is_iterated(run)


@pytest.mark.parametrize("text", ["{", "[]", '{"policies": []}'])
def test_a_spoilt_file_is_named(text, run):
    (run / "rounds.json").write_text(text)
    with pytest.raises(UserError, match=r"rounds\.json.*; delete it and run `ppolite iterate` again"):
        write_rounds_report(run)
