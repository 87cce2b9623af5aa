"""Readers: the field's column names, maps onto other files, and a report of everything that is unusable."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppolite.data import readers
from ppolite.data.readers import read_examples, read_preferences, read_prompts, read_rankings, read_scored
from ppolite.types import Example, Preference, Prompt, Ranking, Scored, UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}


@pytest.fixture
def file(tmp_path: Path):
    def write(*rows: object) -> str:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def q(source: str, row: int = 1, *before: dict[str, str]) -> Prompt:
    return Prompt(messages=(*before, USER), source=f"{source} row {row}")


def test_examples(file) -> None:
    system = {"role": "system", "content": "s"}
    source = file(
        {"messages": [USER, ANSWER]},
        {"messages": [system, USER, ANSWER, USER, OTHER]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    )
    items, report = read_examples(source)
    assert items == [
        Example(q(source, 1), "a"),
        Example(Prompt((system, USER, ANSWER, USER), source=f"{source} row 2"), "b"),
        Example(q(source, 3), "a"),
        Example(q(source, 4), "a"),
        Example(q(source, 5), "a"),
    ]
    assert (report.rows, report.used, report.problems) == (5, 5, [])


def test_plain_text_stays_plain(file) -> None:
    source = file({"prompt": "Once", "completion": " upon"})
    assert read_examples(source, plain=True)[0] == [
        Example(Prompt(text="Once", source=f"{source} row 1"), " upon")
    ]


def test_scores(file) -> None:
    good: list[object] = [1, -2.5, "3e1", True, False, "true"]
    bad: list[object] = ["high", "", None, "nan", float("inf"), [1], {}]
    source = file(*({"prompt": "q", "response": "a", "score": score} for score in good + bad))
    items, report = read_scored(source)
    assert [item.score for item in items] == [1.0, -2.5, 30.0, 1.0, 0.0, 1.0]
    assert items[0] == Scored(q(source), "a", 1.0)
    assert [problem.row for problem in report.problems] == [7, 8, 9, 10, 11, 12, 13]
    assert str(report.problems[0]) == f"{source} row 7: 'score' is 'high'; give a number"


def test_preferences(file) -> None:
    source = file(
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": [ANSWER], "rejected": OTHER, "margin": 2},
        {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "margin": None},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER], "margin": "0.5"},
        {"prompt": "q", "first": "a", "second": "b", "preferred": 1},
        {"prompt": "q", "first": "b", "second": "a", "preferred": "2"},
        {"prompt": "q", "first": "b", "second": "a", "preferred": "Second"},
        {"prompt": "q", "first": "b", "second": "a", "preferred": 2.0},
    )
    items, report = read_preferences(source)
    assert items == [
        Preference(q(source, row), "a", "b", margin)
        for row, margin in zip(range(1, 9), [0, 2, 0, 0.5, 0, 0, 0, 0], strict=True)
    ]
    assert not report.problems


def test_preferences_that_say_nothing(file) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    bad = [
        {**good, "rejected": "a"},
        {**good, "margin": -1},
        {**good, "margin": "much"},
        {"prompt": "q", "first": "a", "second": "b", "preferred": 3},
        {"prompt": "q", "first": "a", "second": "b", "preferred": True},
        {**good, "chosen": [{"role": "user", "content": "else"}, ANSWER]},
        {"chosen": [USER, ANSWER], "rejected": [{"role": "user", "content": "else"}, OTHER]},
        {"chosen": "a b", "rejected": "a c"},
        {**good, "chosen": [USER]},
        {**good, "chosen": "half \ud800"},
    ]
    items, report = read_preferences(file(good, *bad))
    assert len(items) == 1
    assert [problem.row for problem in report.problems] == list(range(2, 12))


def test_a_forgotten_prompt_column_does_not_train_on_shared_letters(file) -> None:
    source = file({"question": "q", "chosen": "I think so", "rejected": "I do not"})
    with pytest.raises(UserError, match=r"columns: \{prompt: NAME\}"):
        read_preferences(source)


def test_zero_based_labels_are_refused(file) -> None:
    pair = {"prompt": "q", "first": "a", "second": "b"}
    with pytest.raises(UserError, match="row 2: 'preferred' is 0"):
        read_preferences(file({**pair, "preferred": 1}, {**pair, "preferred": 0}))


def test_rankings(file) -> None:
    source = file(
        {"prompt": "q", "responses": ["a", "b"]},
        {"prompt": "q", "responses": ["b", OTHER | {"content": "c"}, [ANSWER]], "scores": [1, 0, "2.5"]},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]},
        {"prompt": "q", "responses": ["a", "a"]},
        {"prompt": "q", "responses": ["a"]},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1]},
        {"prompt": "q", "responses": "a"},
    )
    items, report = read_rankings(source)
    assert items == [Ranking(q(source, 1), ("a", "b")), Ranking(q(source, 2), ("a", "b", "c"))]
    assert [problem.row for problem in report.problems] == [3, 4, 5, 6, 7]


def test_prompts(file) -> None:
    source = file({"prompt": "q"}, {"prompt": [USER]}, {"messages": [USER]}, {"messages": [USER, ANSWER]})
    items, report = read_prompts(source)
    assert items == [q(source, row) for row in (1, 2, 3, 4)]
    assert "1 conversations end with an answer" in report.notes[0]


def test_prompts_keep_the_other_columns_of_their_row(file) -> None:
    source = file(
        {"question": "q", "answer": 3, "more": {"level": [1]}, "messages": None},
        {"question": "q", "answer": None},
    )
    items, _ = read_prompts(source, {"prompt": "question"})
    assert [item.columns for item in items] == [{"answer": 3, "more": {"level": [1]}}, {"answer": None}]
    nested = file({"chat": {"q": "q", "tip": "a"}, "answer": 3})
    assert read_prompts(nested, {"prompt": "chat.q"})[0][0].columns["answer"] == 3
    assert read_prompts(file({"messages": [USER, ANSWER], "answer": 3}))[0][0].columns == {"answer": 3}


def test_csv_cells_may_hold_lists(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerows([["prompt", "responses", "scores"], ["q", '["a", "b"]', "[1, 2]"], ["q", "a", "[1]"]])
    items, report = read_rankings(str(path))
    assert [item.responses for item in items] == [("b", "a")]
    assert [problem.row for problem in report.problems] == [2]


def test_csv_cells_may_hold_conversations(tmp_path: Path) -> None:
    """As `candidates.jsonl` has them, after a spreadsheet."""
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(["prompt", "response", "score"])
        rows.writerow([json.dumps([USER]), json.dumps([ANSWER]), 1])
        rows.writerow(["[1, 2] is a list", '{"a": 1}', 2])
    first, second = read_scored(str(path))[0]
    assert (first.prompt, first.response) == (q(str(path)), "a")
    assert (second.prompt.last, second.response) == ("[1, 2] is a list", '{"a": 1}')


def test_columns_that_are_named_come_before_messages(file) -> None:
    row = {"messages": [USER, ANSWER], "question": "x", "reply": "y"}
    source = file(row)
    found = read_examples(source, {"prompt": "question", "completion": "reply"})[0][0]
    assert (found.prompt.last, found.response) == ("x", "y")
    assert read_prompts(source, {"prompt": "question"})[0][0].last == "x"
    assert read_examples(source)[0][0].response == "a"
    assert read_examples(file({"turns": [USER, ANSWER]}), {"messages": "turns"})[0][0].response == "a"


def test_parquet_keeps_lists(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pandas.DataFrame([{"messages": [USER, ANSWER]}, {"messages": None}]).to_parquet(path)
    items, report = read_examples(str(path))
    assert items == [Example(q(str(path)), "a")]
    assert [problem.row for problem in report.problems] == [2]


def test_columns_reach_into_nested_values(file) -> None:
    rows = [{"q": {"text": "q"}, "a.b": "flat", "answers": [{"text": "no"}, {"text": "a"}], "ok": True}]
    source = file(*rows)
    names = {"prompt": "q.text", "response": "answers.-1.text", "score": "ok"}
    assert read_scored(source, names)[0] == [Scored(q(source), "a", 1.0)]
    assert read_scored(source, names | {"response": "a.b"})[0][0].response == "flat"
    for path in ("answers.7.text", "answers.x", "answers.--1", "q.text.0", "ok.a"):
        with pytest.raises(UserError, match=r"no column .*it has q, a\.b, answers, ok"):
            read_scored(source, names | {"response": path})


def test_missing_columns_name_the_nearest(file) -> None:
    source = file({"prompts": "q", "response": "a", "score": 1})
    with pytest.raises(UserError) as caught:
        read_scored(source)
    assert str(caught.value) == (
        f"{source}: no column 'prompt'; it has prompts, response, score; did you mean 'prompts'?"
        " Map it in the recipe: columns: {prompt: NAME}"
    )
    with pytest.raises(UserError, match=r"'scor' is not one of the columns.*did you mean 'score'"):
        read_scored(source, {"scor": "score"})
    pair = file({"prompt": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match="no column 'margni'"):
        read_preferences(pair, {"margin": "margni"})


def test_nothing_usable_is_an_error_that_shows_the_first_row(file) -> None:
    with pytest.raises(UserError, match=r"none of 2 rows can be used\. .* row 1: 'prompt' is empty"):
        read_prompts(file({"prompt": " "}, {"prompt": "\n"}))
    with pytest.raises(UserError, match=r"none of 1 rows can be used\. .* row 1: is a list"):
        read_prompts(file([1]))


def test_film_source_takes_no_columns() -> None:
    with pytest.raises(UserError, match="remove `columns`"):
        read_scored("embedded:film", {"score": "x"})
    with pytest.raises(UserError, match="remove `plain`"):
        read_prompts("embedded:film", plain=True)
    with pytest.raises(UserError, match="holds scores"):
        read_preferences("embedded:film")


# ---- any row whatever ------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = ["prompt", "completion", "response", "messages", "score", "chosen", "rejected", "margin"]
NAMES += ["first", "second", "preferred", "responses", "scores"]
KEYS = st.sampled_from(NAMES)


@pytest.mark.parametrize("read", ["examples", "scored", "preferences", "rankings", "prompts"])
@given(rows=st.lists(st.dictionaries(KEYS, VALUES, max_size=6) | VALUES, max_size=4), plain=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_every_row_is_used_or_reported(tmp_path: Path, read: str, rows: list[Any], plain: bool) -> None:
    path = tmp_path / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    try:
        items, report = getattr(readers, f"read_{read}")(str(path), plain=plain)
    except UserError:
        return
    assert len(items) == report.used
    assert report.rows == len(rows) == report.used + len(report.problems)
    assert all(problem.reason and problem.advice for problem in report.problems)


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace")))
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_any_bytes_give_a_sentence_at_worst(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"any.{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="any"):
        read_scored(str(path))


# ---- other people's files --------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("Natural", 100),
        ("Adversarial_GPTInst", 92),
        ("Adversarial_Manual", 46),
        ("Adversarial_Neighbor", 134),
    ],
)
def test_llmbar(name: str, rows: int) -> None:
    path = SHARED / f"llmbar_{name}.json"
    columns = {"prompt": "input", "first": "output_1", "second": "output_2", "preferred": "label"}
    items, report = read_preferences(str(path), columns)
    assert (len(items), report.problems) == (rows, [])
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert [item.chosen for item in items] == [row[f"output_{row['label']}"] for row in raw]
    assert [item.prompt.last for item in items] == [row["input"] for row in raw]


@needs_shared
def test_chinese_pairs_keep_their_system_turns() -> None:
    items, report = read_preferences(str(SHARED / "dpo_zh_500.jsonl"), {"prompt": "conversations"})
    assert (len(items), report.problems) == (500, [])
    roles = [tuple(turn["role"] for turn in item.prompt.messages) for item in items]
    assert roles.count(("user",)) == 416
    assert roles.count(("system", "user")) == 84  # conversations.0.value would take these for the prompt
    assert "20个关于新鲜果汁菜单的口号" in items[0].prompt.last


@needs_shared
def test_gsm8k_solutions_are_scored_by_correctness() -> None:
    columns = {
        "prompt": "question",
        "response": "6b_finetuning.solution",
        "score": "6b_finetuning.is_correct",
    }
    items, report = read_scored(str(SHARED / "gsm8k_model_solutions.jsonl"), columns)
    assert (len(items), sum(item.score or 0 for item in items), report.problems) == (1319, 286.0, [])
