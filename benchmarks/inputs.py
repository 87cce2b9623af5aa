"""What both sides of a comparison are given, as files: models, prompts, batches.

All of it is made from the film ratings by fixed seeds, and encoded once: both sides see the same token ids in the same
order. It stays in `runs/bench`.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from benchmarks.harness import BENCH
from ppolite.data.chat import encode_example, encode_prompt, prepare_tokenizer
from ppolite.data.film import REQUEST, film_examples, film_prompt, film_prompts, film_scored
from ppolite.data.split import split_by_prompt
from ppolite.models.load import load_tokenizer
from ppolite.stages.opening import resolve
from ppolite.stages.rows import Cycle, batches, shuffled
from ppolite.types import Example, Preference, Prompt, Scored

EMBEDDED = "embedded:smollm2-135m"
SHORT = ("sft.data.limit=320", "reward.data.limit=320", "ppo.min_rm_accuracy=0")
"""Models that will do to take the time of a step: their answers have the length of reviews, and end."""
HELD_OUT = 0.1
"""As in recipes/film.yaml."""

Encoded = tuple[list[int], list[int]]
"""Prompt ids and response ids."""


def models(run: Path, overrides: Sequence[str]) -> None:
    """`RUN/sft` and `RUN/reward` by recipes/film.yaml, trained where they are missing."""
    told = [word for override in overrides for word in ("--set", override)]
    for stage in ("sft", "reward"):
        if not (run / stage).exists():
            print(f"training {run / stage}", flush=True)
            command = [sys.executable, "-m", "ppolite.cli", stage, "film", "--out", str(run), *told]
            subprocess.run(command, check=True)


def random_model(folder: Path, shape: dict[str, int]) -> LlamaForCausalLM:
    """A Llama of that shape with random weights, saved in half precision with the embedded model's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=2048)  # pyright: ignore[reportArgumentType]
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer_of(EMBEDDED).save_pretrained(folder)
    return model


def tokenizer_of(model: str | Path) -> PreTrainedTokenizerBase:
    source = resolve(str(model))
    tokenizer = load_tokenizer(source)
    prepare_tokenizer(tokenizer, AutoConfig.from_pretrained(source))
    return tokenizer


def rounds(model: Path, count: int, size: int, held_out: int = 0) -> Path:
    """Prompts for `count` rounds of PPO, and some that are held out."""
    tokenizer = tokenizer_of(model)
    train, held = split_by_prompt(film_prompts(0)[0], HELD_OUT, 0)
    endless = Cycle(train, seed=0)
    return _written(
        "rounds",
        {
            "rounds": [_given(tokenizer, islice(endless, size)) for _ in range(count)],
            "held_out": _given(tokenizer, shuffled(held, 0)[:held_out]),
        },
    )


def ragged(model: Path, sets: int, size: int) -> Path:
    """Sets of prompts of 40 to 400 tokens: reviews to take as a model, none to ten, and one to be finished.

    The prompts of all sets differ, so that nothing which a system remembers of one set answers another.
    """
    tokenizer = tokenizer_of(model)
    stream = random.Random(0)
    reviews = Cycle([f"{_opening(item)} {item.response}" for item in film_scored(0)[0]], seed=0)
    prompts = []
    for opening in islice(Cycle(film_prompts(0)[0], seed=0), sets * size):
        models_of_it = list(islice(reviews, stream.randrange(11)))
        head = "".join(f"{review}\n\n" for review in models_of_it)
        prompts.append(Prompt(({"role": "user", "content": head + opening.last},)))
    told = _given(tokenizer, prompts)
    return _written("ragged", [told[first : first + size] for first in range(0, len(told), size)])


def sft_batches(model: str, count: int, size: int) -> Path:
    """Full batches of people's endings, of about one length each: as ppolite makes them, and given to both sides."""
    tokenizer = tokenizer_of(model)
    train, _ = split_by_prompt(film_examples(0)[0], HELD_OUT, 0)
    rows = [[encode_example(tokenizer, e.prompt, e.response)] for e in train[: 4 * count * size]]
    return _written("sft", [[row[0] for row in batch] for batch in _full(rows, count, size)])


def preferences() -> list[Preference]:
    """Pairs of reviews that begin with the same two words, of which people rated one at least 1 higher.

    A review is in one pair at most.
    """
    alike: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for item in film_scored(0)[0]:
        words = f"{_opening(item)} {item.response}".split()
        assert item.score is not None
        alike[" ".join(words[:2])].append((item.score, " ".join(words[2:])))
    return [
        Preference(film_prompt(opening), better, worse)
        for opening, found in sorted(alike.items())
        for (low, worse), (high, better) in zip(
            sorted(found)[: len(found) // 2], sorted(found, reverse=True), strict=False
        )
        if high - low >= 1
    ]


def reward_batches(model: Path, count: int, size: int) -> tuple[Path, Path]:
    """`preferences` as a file for our reader, and as full batches of `[chosen, rejected]` for both sides."""
    tokenizer = tokenizer_of(model)
    pairs = preferences()
    rows = [[encode_example(tokenizer, p.prompt, text) for text in (p.chosen, p.rejected)] for p in pairs]
    lines = [{"prompt": p.prompt.messages, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    return _written("preferences", lines), _written("reward", _full(rows, count, size))


def _full(rows: list[list[Encoded]], count: int, size: int) -> list[list[list[Encoded]]]:
    made = batches(rows, size, epochs=100, seed=0, length=lambda row: max(len(p) + len(r) for p, r in row))
    return list(islice((batch for batch in made if len(batch) == size), count))


def _opening(item: Scored | Example) -> str:
    return item.prompt.last.removeprefix(REQUEST)


def _given(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt]) -> list[dict[str, Any]]:
    return [{"messages": p.messages, "ids": encode_prompt(tokenizer, p)} for p in prompts]


def _written(name: str, content: Any) -> Path:
    path = BENCH / "inputs" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
