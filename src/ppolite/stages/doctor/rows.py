"""The data as files: which rows can be used, whether the columns are what they are called, what leaks.

Whether rows fit a model is told by the stages, whose limits they are (`quick.lengths`); of prompts, here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ppolite.config import Data, Recipe
from ppolite.data.chat import check_lengths, encode_prompt
from ppolite.data.report import Report
from ppolite.data.split import prompt_key
from ppolite.stages.doctor.finding import Finding, graded, skipped
from ppolite.stages.opening import Opened
from ppolite.stages.reward import ITEMS
from ppolite.stages.rows import read_rows, split_rows
from ppolite.types import Example, Preference, Prompt, Ranking, Scored, UserError


@dataclass
class Source:
    """What a section reads."""

    section: str
    data: Data
    train: list[Any]
    held: list[Any]
    report: Report

    @property
    def items(self) -> list[Any]:
        return self.train + self.held


def read(recipe: Recipe) -> tuple[list[Source], list[Finding]]:
    """The sources of all sections that the recipe has, and a finding about each."""
    wanted = {
        "sft": (recipe.sft and recipe.sft.data, "examples"),
        "reward": (recipe.reward and recipe.reward.data, ITEMS[recipe.reward.kind] if recipe.reward else ""),
        "ppo": (recipe.ppo and recipe.ppo.prompts, "prompts"),
    }
    sources: list[Source] = []
    found: list[Finding] = []
    for section, (data, kind) in wanted.items():
        if data is None:
            found.append(skipped(f"{section}/data", "the recipe names none"))
            continue
        try:
            items, report = read_rows(data, kind)
            source = Source(section, data, *split_rows(items, data, recipe.seed), report)
        except UserError as error:
            found.append(Finding(f"{section}/data", "fail", data.path, str(error)))
            continue
        sources.append(source)
        found.append(usable(source))
    return sources, found


def usable(source: Source) -> Finding:
    report, most = source.report, source.data.limit
    bad = len(report.problems)
    taken = f", the first {most:,} of them trained on" if most and most < len(source.train) else ""
    return graded(
        f"{source.section}/data",
        f"{report.used:,} of {report.rows:,} rows; {len(source.train):,} to train on{taken}, {len(source.held):,} "
        "held out",
        f"{bad:,} rows are left out; {report.problems[0]}" if bad else "",
        warn=bad > 0.02 * report.rows,
        fail=bad > 0.5 * report.rows,
    )


def examine(sources: Sequence[Source]) -> list[Finding]:
    """All that can be seen without a model."""
    prompts = {_plain(_prompt(item).last) for source in sources for item in source.items}
    found = [columns(source, prompts) for source in sources if source.section != "ppo"]
    found += [scores(source) for source in sources if isinstance(source.train[0], Scored)]
    return [*found, leak(sources)]


def columns(source: Source, prompts: set[str]) -> Finding:
    """Whether answers are answers. `prompts` are those of all sections."""
    pairs = [(_prompt(item), answer) for item in source.items for answer in answers(item)]
    swapped = sum(_plain(answer) in prompts for _, answer in pairs) / len(pairs)
    repeating = sum(_plain(answer).startswith(_plain(prompt.last)) for prompt, answer in pairs) / len(pairs)
    rows = {(prompt_key(_prompt(item)), tuple(answers(item))) for item in source.items}
    twice = 1 - len(rows) / len(source.items)
    remedy = (
        "prompts stand where answers should: see data.columns"
        if swapped > 0.1
        else "the prompt stands in the column of the answer: give the answer alone"
        if repeating > 0.1
        else "leave out what is there twice: it counts twice"
    )
    return graded(
        f"{source.section}/columns",
        f"of {len(pairs):,} answers {swapped:.1%} are prompts elsewhere, {repeating:.1%} begin with their prompt; "
        f"{twice:.1%} of the rows are there before",
        remedy,
        warn=max(swapped, repeating, twice) > 0.1,
        fail=max(swapped, repeating) > 0.5,
    )


def scores(source: Source) -> Finding:
    """Whether people's scores tell answers apart."""
    given = [item.score for item in source.train]
    value, count = Counter(given).most_common(1)[0]
    return graded(
        f"{source.section}/scores",
        f"{min(given):g} … {max(given):g}, {len(set(given)):,} different ones, {value:g} in {count / len(given):.0%}",
        "gather scores that differ: a reward model learns from differences",
        warn=count > 0.95 * len(given),
        fail=count == len(given),
    )


def leak(sources: Sequence[Source]) -> Finding:
    """Whether the prompts on which PPO is judged are among those that another stage has trained on."""
    name, by = "data/held out", {source.section: source for source in sources}
    if "ppo" not in by or len(by) == 1:
        return skipped(name, "only one section reads data")
    tests = {prompt_key(prompt) for prompt in by["ppo"].held}
    seen = {s: len(tests & {prompt_key(_prompt(i)) for i in by[s].train}) for s in by if s != "ppo"}
    return graded(
        name,
        f"{len(tests):,} prompts; "
        + ", ".join(f"{count:,} of them trained on in {s}" for s, count in seen.items()),
        "give all sections the same `held_out`, a share below 1: then they hold out the same prompts",
        warn=max(seen.values()) > 0.01 * len(tests),
    )


def room(source: Source, opened: Opened, most: int) -> Finding:
    """Whether prompts leave room for an answer of `most` tokens; those that do not are left out."""
    name = "ppo/lengths"
    ids = [encode_prompt(opened.tokenizer, prompt) for prompt in source.items]
    try:
        kept, _ = check_lengths(ids, opened.context - most, [""] * len(ids))
    except UserError:
        kept = []
    gone = len(ids) - len(kept)
    return graded(
        name,
        f"{gone:,} of {len(ids):,} prompts have no room for {most:,} new tokens in a context of {opened.context:,}; "
        f"the longest has {max(map(len, ids)):,}",
        "lower ppo.max_new_tokens, shorten the prompts, or take a model with a longer context",
        warn=gone > 0.02 * len(ids),
        fail=gone > 0.5 * len(ids),
    )


def answers(item: Any) -> Iterator[str]:
    """The answers of a row; none of a prompt."""
    match item:
        case Example() | Scored():
            yield item.response
        case Preference():
            yield from (item.chosen, item.rejected)
        case Ranking():
            yield from item.responses
        case _:
            return


def pairs_of(sources: Sequence[Source], most: int) -> list[tuple[Prompt, str]]:
    """The first rows of each source that has answers."""
    return [
        (_prompt(item), answer)
        for source in sources
        for item in source.train[:most]
        for answer in answers(item)
    ]


def prompts_of(source: Source, most: int) -> list[Prompt]:
    return [_prompt(item) for item in source.train[:most]]


def _prompt(item: Any) -> Prompt:
    return item if isinstance(item, Prompt) else item.prompt


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
