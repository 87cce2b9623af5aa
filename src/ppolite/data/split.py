"""The held-out split: by prompt, so that nothing is tested on a prompt that training saw.

Each prompt gets a number from a hash of its text and the seed, and the smallest numbers are held out. So
the split does not depend on the order of rows, and files that share prompts (SFT examples, scores, PPO
prompts) hold out the same ones when the same *fraction* is asked for. A file of prompts that such a split left for
training has hardly any of these; there, half the fraction of its own prompts is held out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TypeVar

from ppolite.types import Example, Preference, Prompt, Ranking, Scored, UserError

T = TypeVar("T", bound=Prompt | Example | Scored | Preference | Ranking)


def stable_hash(*parts: object) -> int:
    """64 bits that are the same in every process and on every machine, which `hash` is not."""
    text = json.dumps([str(part) for part in parts], ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=8).digest(), "big")


def prompt_key(prompt: Prompt) -> str:
    """Equal for prompts that count as one: letter case and the amount of white space do not matter."""
    turns = [(turn["role"], turn["content"]) for turn in prompt.messages] or [("", prompt.text)]
    return json.dumps([(role, " ".join(text.casefold().split())) for role, text in turns])


def split_by_prompt(
    items: Sequence[T], held_out: float | int, seed: int = 0, *, source: str = "data"
) -> tuple[list[T], list[T]]:
    """`(train, held)`, each in the order of `items`, with no prompt in both.

    `held_out` is a fraction of the prompts (float, below 1), or a number of rows (int): then prompts are
    held out until at least so many rows are. Use the fraction where several stages must hold out the same.
    Raises UserError, beginning with `source`, where nothing is left on either side.
    """
    counts: dict[str, int] = {}
    keys = [prompt_key(item if isinstance(item, Prompt) else item.prompt) for item in items]
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    if (isinstance(held_out, float) and not 0 <= held_out < 1) or held_out < 0:
        raise UserError(
            f"{source}: held_out is {held_out}; give a fraction from 0 up to below 1, or a number of rows"
        )
    if held_out and len(counts) < 2:
        raise UserError(
            f"{source}: held_out is {held_out}, but all {len(items):,} rows have the same prompt; add rows with other"
            " prompts (or, for SFT alone, set held_out to 0)"
        )
    numbers = sorted((stable_hash(seed, key), key) for key in counts)
    held: set[str] = set()
    rows = 0
    for number, key in numbers:
        if isinstance(held_out, float):
            enough = number >= held_out * 2**64 and len(held) >= max(1, held_out * len(counts) / 2)
        else:
            enough = rows >= held_out
        if enough or not held_out:
            break
        held.add(key)
        rows += counts[key]
    if len(held) == len(counts):
        if not isinstance(held_out, float):
            raise UserError(
                f"{source}: held_out is {held_out}, which leaves none of {len(items):,} rows for training; lower it"
            )
        held.remove(numbers[-1][1])
    return (
        [item for item, key in zip(items, keys, strict=True) if key not in held],
        [item for item, key in zip(items, keys, strict=True) if key in held],
    )
