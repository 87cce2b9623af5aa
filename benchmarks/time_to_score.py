"""Seconds of training until answers to held-out prompts are rated 1.5 higher, beside TRL 1.12.0.

The same SFT model, reward model (trained in full by recipes/film.yaml), prompts and round size for both; the score is
what the reward model predicts that people would say, on −4..4. Every second round the policy is saved, and looked at by
plain transformers (`workers/held_out.py`) with the clock stopped; the first look at which the gain is there ends the
run. Loading is not on the clock either. Each system's settings are tried once, and the one that arrives first runs in
pairs, each pair with a seed of its own.

TRL's settings have the recipe's numbers where they train what the recipe trains; where all is trained, lower learning
rates are among those tried.

    make bench-peers ARGS=time_to_score             # hours: 14 rounds at most, five pairs
    make bench-peers ARGS='time_to_score --ours film --peer top --pairs 3'
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import MEMORY, Book, Figure, Run, Side, compared
from benchmarks.harness import BENCH, OURS, arguments, fastest, in_turn, measure, worker
from benchmarks.inputs import models, rounds
from benchmarks.rlhf_step import OWN, PEERS, PLAIN, add_settings, chosen, own_side, peer_side
from ppolite import load_recipe
from ppolite.models.load import compute_dtype, pick_device

SECONDS = Figure("seconds", "s", "time")
FIGURES = (SECONDS, Figure("round", "rounds", "note"), Figure("kl", "nats of KL", "note"), MEMORY)


def rates(policy: str, critic: str) -> list[str]:
    return [f"ppo.optim.lr={policy}", f"ppo.critic.lr={critic}"]


TRL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "top": (PEERS["top"], []),
    "lora-top, lr 3e-4": (PEERS["lora-top"], rates("3e-4", "6e-4")),
    "full, lr 3e-5": (PLAIN, rates("3e-5", "1e-4")),
    "full, lr 1e-5": (PLAIN, rates("1e-5", "3e-5")),
}
"""Setting and overrides of the recipe."""
HALF: dict[str, tuple[dict[str, Any], list[str]]] = {
    "top, bf16 autocast": (PEERS["top"] | {"autocast": True}, []),
    "lora-top, bf16 autocast, lr 3e-4": (PEERS["lora-top"] | {"autocast": True}, rates("3e-4", "6e-4")),
}
"""The same where ours runs in bfloat16 too."""


class Watch:
    """Looks at policies as they come, and says whether training goes on."""

    def __init__(self, args: argparse.Namespace, prompts: Path, length: int) -> None:
        self.args, self.prompts, self.length = args, prompts, length
        self.start = self.look(args.run / "sft")["score"]
        print(f"the SFT model scores {self.start:.2f} on held-out prompts", flush=True)

    def look(self, policy: Path) -> Run:
        told = {"policy": policy, "sft": self.args.run / "sft", "reward": self.args.run / "reward"}
        command = worker(OURS, "held_out", prompts=self.prompts, max_new_tokens=self.length, **told)
        return measure(Side("held-out", "look", command), self.args.threads)

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        seen = self.look(Path(asked["policy"]))
        gain, kl = seen["score"] - self.start, seen["kl"]
        print(
            f"    round {asked['round']}, {asked['seconds']:.0f} s: {gain:+.2f} at {kl:.1f} nats", flush=True
        )
        reached = gain >= self.args.gain
        figures = {"gain": gain, "kl": kl, "tokens": seen["tokens"]}
        return {
            "round": asked["round"],
            "seconds": asked["seconds"],
            **figures,
            "reached": reached,
            "more": not reached,
        }


def notes(sides: Sequence[Side], runs: Sequence[Sequence[Run]], gain: float) -> list[str]:
    """What a time means where the gain was not reached."""
    return [
        f"{side.name} did not reach +{gain:g} in {missed} of {len(mine)} runs, whose seconds are those of all rounds"
        + ("" if side is sides[0] else ", so that a ratio is at least what stands here")
        for side, mine in zip(sides, runs, strict=True)
        if (missed := sum(not run["reached"] for run in mine))
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gain", type=float, default=1.5, help="in people's units")
    parser.add_argument("--rounds", type=int, default=14, help="at most; the schedule of the learning rate")
    parser.add_argument("--every", type=int, default=2, help="rounds between two looks")
    parser.add_argument("--held-out", type=int, default=200, help="prompts in a look")
    parser.add_argument(
        "--run", type=Path, default=BENCH / "film", help="where sft and reward model are, or go"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe, for both sides"
    )
    add_settings(parser, OWN, [*TRL, *HALF])
    args = parser.parse_args()
    book = Book("time_to_score", args)
    models(args.run, [])
    config = load_recipe("film", args.set).ppo
    assert config
    prompts = rounds(args.run / "sft", args.rounds, config.rollouts, args.held_out)
    folder = BENCH / "policy"
    told = {"run": args.run, "prompts": prompts, "rounds": args.rounds, "warmup": 0}
    told |= {"every": args.every, "folder": folder}
    watch = Watch(args, prompts, config.max_new_tokens)
    own = chosen(OWN, args.ours).items()
    ours, tried = fastest([own_side(k, r, [*args.set, *o], told) for k, (r, o) in own], SECONDS, args, watch)
    half = compute_dtype("auto", pick_device("auto")) == torch.bfloat16
    peers = chosen(TRL | HALF, args.peer or [*TRL, *(HALF if half else ())]).items()
    theirs, more = fastest(
        [peer_side(k, spec, [*args.set, *o], told) for k, (spec, o) in peers], SECONDS, args, watch
    )
    sides = [ours, theirs]
    runs = in_turn(sides, SECONDS, args, watch)
    arrived = all(
        run["reached"] for run in runs[0]
    )  # else our seconds are no time to the score, and have no ratio
    book.write(
        f"until +{args.gain:g}",
        compared(sides, runs, FIGURES if arrived else FIGURES[1:]),
        tried=tried + more,
        notes=notes(sides, runs, args.gain),
        score_before=watch.start,
    )
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
