"""What `sft` and `reward` share: tokens per second of updates, beside TRL of today.

Both get the same token ids in the same batches (of about one length each, as ppolite makes them, so that neither pads
much), the same optimizer, clipping and number of updates. The first two updates are a warm-up. Tokens are those of
prompts and answers, without padding.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.figures import GPU_MEMORY, MEMORY, Book, Figure, Run, Side, compared
from benchmarks.harness import OURS, arguments, environment, fastest, in_turn, worker
from ppolite import load_recipe

RATE = Figure("tokens_per_s", "tokens/s", "rate")
FIGURES = (RATE, Figure("updates", "updates", "note"), MEMORY, GPU_MEMORY)
WARMUP = 2
PEER = "TRL 1.16.0"

OWN: dict[str, tuple[str, list[str]]] = {
    "film": ("film", []),
    "film_lora": ("film_lora", []),
    "film_lora, split 20": ("film_lora", ["trunk.split=20"]),
}
PLAIN: dict[str, Any] = {
    "train": "full",
    "split": 20,
    "weights": "float32",
    "autocast": False,
    "checkpointing": False,
    "padding_free": False,
}
PEERS: dict[str, dict[str, Any]] = {
    "lora-top": PLAIN | {"train": "lora-top"},
    "top": PLAIN | {"train": "top"},
    "lora": PLAIN | {"train": "lora"},
    "full": PLAIN,
    "full, checkpointing": PLAIN | {"checkpointing": True},
    "lora-top, bf16 autocast": PLAIN | {"train": "lora-top", "autocast": True},
    "lora-top, bf16 weights": PLAIN | {"train": "lora-top", "weights": "bfloat16"},
}
"""See `workers/train_trl.py`. The likely fastest come first: what takes three times as long is ended."""


def whole(stage: str) -> list[str]:
    """Everything trained, at one low rate on both sides."""
    optim = (f"{stage}.optim.lr=1e-5", f"{stage}.optim.schedule=constant", f"{stage}.optim.warmup=0")
    return ["train.kind=full", "trunk.split=0", "dtype=float32", *optim]


def parser_of(doc: str | None, peers: dict[str, dict[str, Any]]) -> argparse.ArgumentParser:
    parser = arguments(doc)
    parser.add_argument("--updates", type=int, default=20, help="measured in each process")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--only", choices=["like", "best"], help="one of the two comparisons")
    parser.add_argument("--ours", choices=OWN, help="our setting in `best`, instead of trying all")
    parser.add_argument("--peer", choices=peers, help="TRL's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe, for both sides"
    )
    return parser


def compare(
    stage: str,
    args: argparse.Namespace,
    book: Book,
    peers: dict[str, dict[str, Any]],
    told: dict[str, Any],
    overrides: list[str],
) -> None:
    """Like for like, and the fastest setting of each system; `overrides` are of ours, everywhere."""
    python, told = environment(".venv-trl", PEER), told | {"stage": stage, "warmup": WARMUP}

    def own(setting: str, recipe: str, more: list[str]) -> Side:
        command = worker(OURS, "train_ours", recipe=recipe, overrides=[*overrides, *args.set, *more], **told)
        return Side("ppolite", setting, command)

    def peer(setting: str, spec: dict[str, Any], more: list[str]) -> Side:
        recipe = load_recipe("film", [*args.set, *more])
        adam = getattr(recipe, stage).optim.model_dump()
        lora = {"rank": recipe.train.rank, "alpha": recipe.train.alpha}
        return Side(PEER, setting, worker(python, "train_trl", adam=adam, lora=lora, **spec, **told))

    if args.only != "best":
        sides = [
            own("train full, float32", "film", whole(stage)),
            peer("full, float32", PLAIN, whole(stage)),
        ]
        runs = in_turn(sides, RATE, args)
        book.write("like for like", compared(sides, runs, FIGURES), notes=losses(sides, runs))
    if args.only != "like":
        mine = {args.ours: OWN[args.ours]} if args.ours else OWN
        theirs = {args.peer: peers[args.peer]} if args.peer else peers
        ours, tried = fastest([own(name, *setting) for name, setting in mine.items()], RATE, args)
        best, more = fastest([peer(name, spec, []) for name, spec in theirs.items()], RATE, args)
        sides = [ours, best]
        runs = in_turn(sides, RATE, args)
        book.write("best against best", compared(sides, runs, FIGURES), tried=tried + more)


def losses(sides: list[Side], runs: list[list[Run]]) -> list[str]:
    """First and last loss of each side: the same but for rounding, where nothing is drawn at random."""
    told = (
        f"{side.name} {mine[0]['losses'][0]:.4f} → {mine[0]['losses'][-1]:.4f}"
        for side, mine in zip(sides, runs, strict=True)
    )
    return [f"loss at the first and at the last update: {', '.join(told)}"]
