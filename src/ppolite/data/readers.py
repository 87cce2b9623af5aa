"""Rows become prompts, examples, scored responses, preferences and rankings.

| reader | columns, by our names |
|---|---|
| `read_examples` | `messages`, or `prompt` + `completion` |
| `read_scored` | `prompt`, `response`, `score` |
| `read_preferences` | `prompt`, `chosen`, `rejected`, or `prompt`, `first`, `second`, `preferred` (1 or 2) |
| `read_rankings` | `prompt`, `responses`, and `scores` (larger is better) or else best first |
| `read_prompts` | `prompt` or `messages` |

These are TRL's names. A preference may have a `margin` and an `origin`; without `prompt`, `chosen` and
`rejected` are whole conversations that share their beginning. `columns` maps the names to a file's own, with
dots and positions for nested values: `{response: solutions.0.text}`. A prompt is text (one user message; with
`plain=True` text to continue) or a list of messages, `{role, content}` or `{from, value}`; a response is text or
an assistant message, which may follow the prompt's.

Every reader returns `(items, report)`. A row that cannot be used is in the report with reason and advice; a
source of which nothing can be used is a UserError. Of `messages` the last assistant turn is the example.

    python -c "from ppolite.data.readers import read_prompts; print(read_prompts('embedded:film')[1].lines())"
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from ppolite.data import film
from ppolite.data.report import Report
from ppolite.data.row import Columns, Row, asking, short, to_number
from ppolite.data.tables import RowError, named, nearest, read_rows
from ppolite.types import Example, Preference, Prompt, Ranking, Scored, UserError

T = TypeVar("T")
Forms = tuple[tuple[str, ...], ...]


def read_examples(
    source: str, columns: Columns | None = None, *, plain: bool = False
) -> tuple[list[Example], Report]:
    """Prompts with the answers that SFT imitates."""
    if source == film.SOURCE:
        _check_film(columns, plain)
        return film.film_examples()

    def build(row: Row) -> Example:
        if _in_messages(row, columns):
            turns = row.messages("messages")
            if turns[-1]["role"] != "assistant":
                raise RowError("'messages' ends without an answer", "end it with an assistant turn")
            return Example(asking(turns[:-1], row.where, "messages"), turns[-1]["content"])
        prompt = row.prompt(plain)
        return Example(prompt, row.answer("completion", prompt))

    return _read(source, columns, (("messages",), ("prompt", "completion")), build)


def read_scored(
    source: str, columns: Columns | None = None, *, plain: bool = False
) -> tuple[list[Scored], Report]:
    """Responses with people's scores. true and false count as 1 and 0; a row without a score is reported."""
    if source == film.SOURCE:
        _check_film(columns, plain)
        return film.film_scored()

    def build(row: Row) -> Scored:
        prompt = row.prompt(plain)
        return Scored(prompt, row.answer("response", prompt), row.number("score"))

    return _read(source, columns, (("prompt", "response", "score"),), build)


def read_preferences(
    source: str, columns: Columns | None = None, *, plain: bool = False
) -> tuple[list[Preference], Report]:
    """Pairs of responses, of which people preferred one."""
    _refuse_film(source)

    def build(row: Row) -> Preference:
        if row.has("preferred"):
            prompt = row.prompt(plain)
            pair = row.answer("first", prompt), row.answer("second", prompt)
            chosen, rejected = pair if _is_first(row.get("preferred"), row.where) else pair[::-1]
        elif row.has("prompt"):
            prompt = row.prompt(plain)
            chosen, rejected = row.answer("chosen", prompt), row.answer("rejected", prompt)
        else:
            prompt, chosen, rejected = row.implicit_pair()
        if chosen == rejected:
            raise RowError("both responses are the same", "a preference needs two different ones")
        margin = row.number("margin") if row.get("margin", None) not in (None, "") else 0.0
        if margin < 0:
            raise RowError(f"'margin' is {margin:g}", "exchange the responses, or give a margin of 0 or more")
        origin = str(row.get("origin")) if row.has("origin") else ""
        return Preference(prompt, chosen, rejected, margin, origin)

    forms = (
        ("prompt", "chosen", "rejected"),
        ("prompt", "first", "second", "preferred"),
        ("chosen", "rejected"),
    )
    return _read(source, columns, forms, build, optional=("margin", "origin"))


def read_rankings(
    source: str, columns: Columns | None = None, *, plain: bool = False
) -> tuple[list[Ranking], Report]:
    """Several responses to one prompt, sorted best first."""
    _refuse_film(source)

    def build(row: Row) -> Ranking:
        prompt = row.prompt(plain)
        responses = tuple(row.answer_in(value, "responses", prompt) for value in row.list("responses"))
        if len(set(responses)) < max(2, len(responses)):
            raise RowError(
                f"has {len(set(responses))} different responses", "rank two or more, all different"
            )
        if not row.has("scores"):
            return Ranking(prompt, responses)
        scores = [to_number(value, "scores") for value in row.list("scores")]
        if len(scores) != len(responses):
            raise RowError(
                f"has {len(responses)} responses but {len(scores)} scores", "give each response one score"
            )
        if len(set(scores)) < len(scores):
            raise RowError(
                "two responses have the same score", "a ranking has no ties; leave one of them out"
            )
        best_first = sorted(range(len(scores)), key=lambda i: -scores[i])
        return Ranking(prompt, tuple(responses[i] for i in best_first))

    return _read(source, columns, (("prompt", "responses"),), build, optional=("scores",))


def read_prompts(
    source: str, columns: Columns | None = None, *, plain: bool = False
) -> tuple[list[Prompt], Report]:
    """What the policy answers during PPO, with its row's other columns, for reward functions.

    An answer at the end of `messages` is cut off, and noted.
    """
    if source == film.SOURCE:
        _check_film(columns, plain)
        return film.film_prompts()
    answered = 0

    def build(row: Row) -> Prompt:
        nonlocal answered
        others = row.others("prompt", "messages")
        if not _in_messages(row, columns):
            return replace(row.prompt(plain), columns=others)
        turns = row.messages("messages")
        if turns[-1]["role"] == "assistant":
            answered += 1
            turns = turns[:-1]
        return replace(asking(turns, row.where, "messages"), columns=others)

    items, report = _read(source, columns, (("prompt",), ("messages",)), build)
    if answered:
        report.notes.append(f"{source}: {answered:,} conversations end with an answer; it was cut off")
    return items, report


def _in_messages(row: Row, columns: Columns | None) -> bool:
    """Whether the row's text is in `messages`, and not in the columns that the recipe names instead."""
    named = set(columns or {})
    return row.has("messages") and ("messages" in named or not named & {"prompt", "completion"})


def _is_first(value: object, where: str) -> bool:
    name = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip().lower()
    if name == "0":
        # Skipping this row would leave the file's 1s, which then may mean the second response.
        raise UserError(f"{where}: 'preferred' is 0; number the responses 1 and 2, and leave out ties")
    if isinstance(value, bool) or name not in {"1", "2", "first", "second"}:
        raise RowError(f"'preferred' is {short(value)}", "give 1 or 2 ('first' or 'second')")
    return name in {"1", "first"}


# ---- all rows --------------------------------------------------------------------------------------------


def _read(
    source: str,
    columns: Columns | None,
    forms: Forms,
    build: Callable[[Row], T],
    optional: tuple[str, ...] = (),
) -> tuple[list[T], Report]:
    """Build an item from each row, in the first of `forms` whose columns the source has."""
    columns = columns or {}
    ours = [*dict.fromkeys(name for form in forms for name in form), *optional]
    for name in columns:
        if name not in ours:
            raise UserError(
                f"columns: {name!r} is not one of the columns read here ({', '.join(ours)})"
                f"{nearest(name, ours)}"
            )
    values, report = read_rows(source)
    rows = [(number, Row(row, columns, f"{source} row {number}")) for number, row in values]
    if rows:
        _check_columns(source, [row for _, row in rows], forms)
    items: list[T] = []
    for number, row in rows:
        try:
            items.append(build(row))
        except RowError as bad:
            report.add(number, bad.reason, bad.advice)
    report.problems.sort(key=lambda problem: problem.row)
    report.used = len(items)
    if not items:
        raise UserError(f"{source}: none of {report.rows:,} rows can be used. {report.problems[0]}")
    return items, report


def _check_columns(source: str, rows: list[Row], forms: Forms) -> None:
    """Raise UserError where no row has a column that `columns` names, or where no form is complete."""
    mapped = rows[0].columns
    # A column that is there but empty is no missing column: candidates nobody has rated yet, for instance.
    here = {name for name in {*mapped, *chain(*forms)} if any(row.get(name, row) is not row for row in rows)}
    absent = [[name for name in form if name not in here] for form in forms]
    lost = [name for name in mapped if name not in here]
    if all(absent):
        # The form that the source comes nearest to: with `prompt` there, `completion` is missing, not `messages`.
        lost += min(zip(absent, forms, strict=True), key=lambda pair: len(pair[0]) / len(pair[1]))[0]
    if not lost:
        return
    missing = lost[0]
    theirs = mapped.get(missing, missing)
    there = list(dict.fromkeys(str(name) for row in rows for name in row.values))
    raise UserError(
        f"{source}: no column {theirs!r}; it has {named(there)}{nearest(theirs, there) or '.'}"
        f" Map it in the recipe: columns: {{{missing}: NAME}}"
    )


def _check_film(columns: Columns | None, plain: bool) -> None:
    if columns or plain:
        key = "columns" if columns else "plain"
        raise UserError(f"{film.SOURCE} comes ready as conversations; remove `{key}` from the recipe")


def _refuse_film(source: str) -> None:
    if source == film.SOURCE:
        raise UserError(f"{source} holds scores; read it as scores, or name a file of pairs or rankings")
