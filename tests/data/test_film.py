"""The film task: whole reviews in two pieces, all rows accounted for, no opening on both sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppolite.data.film import film_examples, film_prompts, film_rows, film_scored, judge_text
from ppolite.data.readers import read_scored
from ppolite.data.split import prompt_key, split_by_prompt

LONG = " ".join(f"word{i}" for i in range(46))
TEXTS = ["one two three four five six", "ONE two  three four five six!", "Too few words here now", LONG]


@pytest.fixture
def rows(cache: Path) -> list[str]:
    cache.mkdir()
    texts = [*TEXTS, *(f"opening {i} of some film review" for i in range(200))]
    lines = "".join(f"{i}\t{i / 100}\t{text}\n" for i, text in enumerate(texts, start=1))
    (cache / "film.tsv").write_text("id\tscore\ttext\n" + lines, encoding="utf-8")
    return texts


def test_opening_and_response_are_the_whole_review(rows: list[str]) -> None:
    items, report = film_scored()
    whole = {" ".join(text.split()): i / 100 for i, text in enumerate(rows, start=1)}
    for item in items:
        assert whole[judge_text(item.prompt, item.response)] == item.score
        assert not item.response.startswith(" ")
        assert item.prompt.messages[0] == {"role": "system", "content": "You are a film critic."}
        assert 2 <= len(item.prompt.last.removeprefix("Finish this review: ").split()) <= 4
    assert (report.rows, report.used, report.problems) == (202, 202, [])
    assert report.notes == ["embedded:film: the task takes 6 to 45 words; 2 other snippets left out"]
    assert len(items) == 202


def test_seed_and_order(rows: list[str]) -> None:
    assert film_scored(1) == film_scored(1)
    assert film_scored(1)[0] != film_scored(2)[0]
    order = [int(item.prompt.source.rpartition(" ")[2]) for item in film_scored()[0]]
    assert order != sorted(order)
    assert read_scored("embedded:film") == film_scored()
    assert film_rows()[1] == ("ONE two  three four five six!", 0.02)


def test_pools_share_their_prompts(rows: list[str]) -> None:
    scored, examples, prompts = film_scored()[0], film_examples()[0], film_prompts()[0]
    assert [(item.prompt, item.response) for item in scored] == [(e.prompt, e.response) for e in examples]
    keys = [prompt_key(prompt) for prompt in prompts]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {prompt_key(item.prompt) for item in scored}


@pytest.mark.real
def test_the_real_reviews(real_model: Path) -> None:
    items, report = film_scored()
    assert report.used == report.rows == 10_025
    assert -4 <= min(item.score or 0 for item in items) < max(item.score or 0 for item in items) <= 4
    held = split_by_prompt(items, 0.15)[1]
    held_prompts = split_by_prompt(film_prompts()[0], 0.15)[1]
    assert len(held) >= 1000
    assert len(held_prompts) >= 1000
    assert {prompt_key(item.prompt) for item in held} == {prompt_key(prompt) for prompt in held_prompts}
