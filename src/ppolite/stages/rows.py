"""The rows that a stage learns from: read, split, shuffled, in batches."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ppolite.config import PPO, Data
from ppolite.data.chat import check_lengths, encode_prompt
from ppolite.data.readers import read_examples, read_preferences, read_prompts, read_rankings, read_scored
from ppolite.data.report import Report
from ppolite.data.split import prompt_key, split_by_prompt
from ppolite.stages.opening import Opened
from ppolite.stages.seeds import derive_seed
from ppolite.types import Prompt, UserError

log = logging.getLogger("ppolite")
T = TypeVar("T")


READERS = {
    "examples": read_examples,
    "scored": read_scored,
    "preferences": read_preferences,
    "rankings": read_rankings,
    "prompts": read_prompts,
}


def read_rows(data: Data, kind: str) -> tuple[list[Any], Report]:
    """The rows of a source that can be used, and an account of all of them."""
    return READERS[kind](data.path, data.columns, plain=data.plain)


def split_rows(rows: list[Any], data: Data, seed: int) -> tuple[list[Any], list[Any]]:
    """`(train, held out)`, as the section of the recipe asks.

    Of a held-out prompt that stands there several times the first is kept: some of them choose the best policy and the
    others judge it, and a figure's interval counts each as one.
    """
    held_out = data.held_out if data.held_out < 1 else int(data.held_out)
    train, held = split_by_prompt(rows, held_out, seed, source=data.path)
    once: dict[str, Any] = {}
    if held and isinstance(held[0], Prompt):
        for prompt in held:
            once.setdefault(prompt_key(prompt), prompt)
    return train, list(once.values()) or held


def load_split(data: Data, kind: str, seed: int) -> tuple[list[Any], list[Any]]:
    """`(train, held out)` of a source; what its rows suffer from is logged, row by row."""
    rows, report = read_rows(data, kind)
    for line in report.lines():
        log.info(line)
    return split_rows(rows, data, seed)


def load_prompts(
    data: Data, opened: Opened, max_new_tokens: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """`(train, held out)` prompts, each shuffled; those without room for an answer are reported."""
    split: list[list[Prompt]] = []
    for name, prompts in zip(("train", "held"), load_split(data, "prompts", seed), strict=True):
        order = shuffled(prompts, derive_seed(seed, "prompts", name))
        ids = [encode_prompt(opened.tokenizer, p) for p in order]
        limit = opened.context - max_new_tokens
        what = f"the model's context of {opened.context:,} less {max_new_tokens:,} for the answer"
        keep, too_long = check_lengths(ids, limit, [p.source for p in order], what=what)
        for line in too_long:
            log.warning(line)
        split.append([order[i] for i in keep])
    train, held = split
    if not train:
        raise UserError(f"{data.path}: no prompts to train on; see held_out ({data.held_out:g})")
    return train[: data.limit], held


def tests_of(held: Sequence[Prompt], config: PPO) -> list[Prompt]:
    """The held-out prompts behind the `eval_prompts` first, which serve to choose the best policy.

    Raises UserError where fewer than two are left.
    """
    prompts = list(held[config.eval_prompts :])
    if len(prompts) < 2:
        raise UserError(
            f"{config.prompts.path}: {len(held)} prompts are held out, of which {config.eval_prompts} serve "
            "to choose the best policy, and too few are left to judge it; raise ppo.prompts.held_out or "
            "lower ppo.eval_prompts"
        )
    return prompts


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


WINDOW = 8
"""Batches whose rows are sorted by length together."""


def batches(
    items: Sequence[T], size: int, epochs: float, seed: int, length: Callable[[T], int] | None = None
) -> Iterator[list[T]]:
    """`epochs` passes in batches, each pass shuffled anew; the last batch of a pass may be short.

    A row that would be left alone joins the batch before it: what scores of a batch have in common is not learned,
    and one score has nothing else.

    With `length`, rows of about one length go together: within windows of a few batches they are sorted, and
    the batches shuffled. Padding falls from about 40 % to 5 % on film reviews.
    """
    remaining = round(len(items) * epochs)
    epoch = 0
    while remaining > 0:
        order = shuffled(items, derive_seed(seed, "epoch", epoch))[:remaining]
        made: list[list[T]] = []
        for first in range(0, len(order), size * WINDOW):
            window = order[first : first + size * WINDOW]
            if length is not None:
                window.sort(key=length)
            made += [window[i : i + size] for i in range(0, len(window), size)]
        if size > 1 and len(made) > 1 and len(made[-1]) == 1:
            lone = made.pop()
            made[-1] += lone
        yield from made if length is None else shuffled(made, derive_seed(seed, "batches", epoch))
        remaining -= len(order)
        epoch += 1


def count_batches(items: int, size: int, epochs: float) -> int:
    """Raises UserError where `epochs` is so small a share that no row is trained on."""
    whole, part = divmod(round(items * epochs), items)
    if not whole and not part:
        raise UserError(f"epochs is {epochs:g}, which of {items} rows takes none; raise it")
    return whole * _of_a_pass(items, size) + _of_a_pass(part, size)


def _of_a_pass(items: int, size: int) -> int:
    full, rest = divmod(items, size)
    return full + (rest > 1 or rest > full)  # one row joins the batch before it, unless it is the whole pass


class Cycle(Iterator[T]):
    """Endless passes over the items, each shuffled anew. `taken` is all there is to remember of it."""

    def __init__(self, items: Sequence[T], seed: int, taken: int = 0) -> None:
        self.items, self.seed, self.taken = items, seed, taken
        self._pass: tuple[int, list[T]] = -1, []

    def __next__(self) -> T:
        number, place = divmod(self.taken, len(self.items))
        if number != self._pass[0]:
            self._pass = number, shuffled(self.items, derive_seed(self.seed, "cycle", number))
        self.taken += 1
        return self._pass[1][place]
