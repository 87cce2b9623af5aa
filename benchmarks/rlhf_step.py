"""Seconds of one RLHF step (generate, score, prepare, update) beside TRL 1.12.0, the last release that has PPO.

Both get the same film prompts, SFT model and reward model, 32 rollouts of at most 48 new tokens, 4 epochs × 2
minibatches, and end an answer at EOS. The first round of each process is a warm-up. Two comparisons:

    like for like     four whole models, all of policy and critic trained, float32
    best against best the fastest of each system's settings below, each of which is tried once first

In the second, TRL also gets what its users would have to write themselves: frozen lower layers, adapters on the critic
(`full` and `peft` are its own settings). Memory is that of the process from start to end, loading included.

    make bench                                            # ours alone, five steps; appends to benchmarks/results
    make bench-peers ARGS=rlhf_step                       # both comparisons, five pairs
    make bench-peers ARGS='rlhf_step --only best --ours film --peer lora-top peft'
    make bench ARGS='--steps 9 --run runs/demo'           # with the models of a finished run
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.figures import GPU_MEMORY, MEMORY, Book, Figure, Side, compared
from benchmarks.harness import BENCH, OURS, arguments, environment, fastest, in_turn, measure, worker
from benchmarks.inputs import SHORT, models, rounds
from ppolite import load_recipe

STEP = Figure("step_s", "s a step", "time")
FIGURES = (
    STEP,
    Figure("generate_s", "s of it generating", "time"),
    Figure("response_tokens", "response tokens", "note"),
    MEMORY,
    GPU_MEMORY,
)
PEER = "TRL 1.12.0"
GENTLE = ["ppo.optim.lr=1e-5", "ppo.critic.lr=1e-5"]
"""Trained whole at the recipe's rates, the answers' length would change within the measurement."""
WHOLE = ["roles=separate", "train.kind=full", "trunk.split=0", "dtype=float32", *GENTLE]

OWN: dict[str, tuple[str, list[str]]] = {
    "film": ("film", []),
    "film, one body for policy and critic": ("film", ["ppo.critic_body=policy"]),
    "film_lora": ("film_lora", []),
    "film_lora, split 20": ("film_lora", ["trunk.split=20"]),
}
"""Recipe and overrides."""
PLAIN = {"train": "full", "split": 20, "weights": "float32", "autocast": False, "checkpointing": False}
PEERS: dict[str, dict[str, Any]] = {
    "lora-top": PLAIN | {"train": "lora-top"},
    "top": PLAIN | {"train": "top"},
    "lora": PLAIN | {"train": "lora"},
    "peft": PLAIN | {"train": "peft"},
    "full": PLAIN,
    "full, checkpointing": PLAIN | {"checkpointing": True},
    "lora-top, checkpointing": PLAIN | {"train": "lora-top", "checkpointing": True},
    "lora-top, bf16 autocast": PLAIN | {"train": "lora-top", "autocast": True},
    "lora-top, bf16 weights": PLAIN | {"train": "lora-top", "weights": "bfloat16"},
}
"""See `workers/ppo_trl.py`. The likely fastest come first: what takes three times as long is ended."""


def add_settings(parser: argparse.ArgumentParser, own: Collection[str], peers: Collection[str]) -> None:
    """`--ours` and `--peer`: those that are tried; all where nothing is named."""
    for option, names in ("--ours", own), ("--peer", peers):
        parser.add_argument(
            option, choices=names, nargs="+", metavar="SETTING", help=f"to be tried, of: {'; '.join(names)}"
        )


def own_side(setting: str, recipe: str, overrides: list[str], told: dict[str, Any]) -> Side:
    return Side("ppolite", setting, worker(OURS, "ppo_ours", recipe=recipe, overrides=overrides, **told))


def peer_side(setting: str, spec: dict[str, Any], overrides: list[str], told: dict[str, Any]) -> Side:
    """TRL with the numbers of recipes/film.yaml."""
    recipe = load_recipe("film", overrides)
    assert recipe.ppo
    lora = {"rank": recipe.train.rank, "alpha": recipe.train.alpha}
    python = environment(".venv-oracles", PEER)
    return Side(
        PEER, setting, worker(python, "ppo_trl", ppo=recipe.ppo.model_dump(), lora=lora, **spec, **told)
    )


def chosen(table: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    return {name: table[name] for name in names or table}


def alone(book: Book, args: argparse.Namespace, told: dict[str, Any]) -> None:
    """Ours by the shipped recipe: the spread is that of the steps of one process."""
    side = own_side("film", "film", args.set, told)
    run = measure(side, args.threads)
    steps = [row | {"peak_rss_mb": run["peak_rss_mb"], "gpu_mb": run["gpu_mb"]} for row in run["rounds"]]
    book.write("ours alone", compared([side], [steps], FIGURES), versions=run["versions"])


def like_for_like(book: Book, args: argparse.Namespace, told: dict[str, Any]) -> None:
    sides = [
        own_side("roles separate, train full, float32", "film", [*args.set, *WHOLE], told),
        peer_side("full, float32", PLAIN, [*args.set, *GENTLE], told),
    ]
    book.write("like for like", compared(sides, in_turn(sides, STEP, args), FIGURES))


def best_against_best(book: Book, args: argparse.Namespace, told: dict[str, Any]) -> None:
    own = chosen(OWN, args.ours).items()
    ours, tried = fastest([own_side(k, r, [*args.set, *o], told) for k, (r, o) in own], STEP, args)
    peers = chosen(PEERS, args.peer).items()
    theirs, more = fastest([peer_side(k, spec, args.set, told) for k, spec in peers], STEP, args)
    sides = [ours, theirs]
    book.write("best against best", compared(sides, in_turn(sides, STEP, args), FIGURES), tried=tried + more)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=None, help="measured in each process; 2, alone 5")
    parser.add_argument("--run", type=Path, default=BENCH, help="where sft and reward model are, or go")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe, for both sides"
    )
    parser.add_argument("--alone", action="store_true", help="ours by the shipped recipe, without the peer")
    parser.add_argument("--only", choices=["like", "best"], help="one of the two comparisons")
    add_settings(parser, OWN, PEERS)
    args = parser.parse_args()
    book = Book("rlhf_step", args)
    models(args.run, SHORT)
    steps = args.steps or (5 if args.alone else 2)
    config = load_recipe("film", args.set).ppo
    assert config
    told = {
        "run": args.run,
        "prompts": rounds(args.run / "sft", steps + 1, config.rollouts),
        "rounds": steps + 1,
        "warmup": 1,
        "every": None,
        "folder": None,
    }
    args.set = [*args.set, "ppo.min_rm_accuracy=0"]
    if args.alone:
        alone(book, args, told)
        return
    if args.only != "best":
        like_for_like(book, args, told)
    if args.only != "like":
        best_against_best(book, args, told)


if __name__ == "__main__":
    main()
