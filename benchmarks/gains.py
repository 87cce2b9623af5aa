"""What each optimisation of a step gains: phases of the film critic's step without it and with it, in turn.

    counted     operations that torch was asked for, without over with: what it gains if all of them take the same time
    measured    seconds, without over with, pair by pair: the median, the least and the most

*Without* is a setting where there is one, else the part of ppolite that does it is exchanged for one that does not.
All is done in one process, from the same weights, with the same prompts and the same 32 rollouts; an update is that of
one epoch. Run it on an idle machine.

    python -m benchmarks.gains
    python -m benchmarks.gains --only "rows in packs" "bottom run once, kept" --dirty
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.figures import Book, Figure, between, ratio
from benchmarks.floor import PHASES, Phase, learn, measured
from benchmarks.harness import BENCH, arguments
from benchmarks.inputs import SHORT, models
from ppolite import PPO, load_recipe
from ppolite.models.body import Body
from ppolite.models.prepacked import prepacking
from ppolite.models.sequences import Sequences
from ppolite.models.trunk import Trunk
from ppolite.types import Prompt, Rollout

PREPACKED = "prepacked weights"
GENERATE, LEARN = PHASES[:1], PHASES[1:]
TIME = Figure("seconds", "s", "time")


@dataclass(frozen=True)
class Way:
    """An optimisation, and the phases that it touches."""

    phases: tuple[str, ...]
    off: Callable[[PPO], AbstractContextManager[Any]] = nullcontext
    """What undoes it for a while."""
    setting: tuple[str, ...] = ()
    """What a recipe says to have it."""


@contextmanager
def bottom_each_time(ppo: PPO) -> Iterator[None]:
    """Each role runs the frozen layers itself, in every pass."""
    trunk, bottom, hidden = ppo.roles.trunk, Trunk.bottom, Body._hidden

    def later(self: Trunk, seqs: Sequences, *_: Any) -> Sequences:
        return replace(seqs, packed=self.packed)

    def whole(self: Body, seqs: Sequences) -> tuple[Tensor, Tensor]:
        return hidden(self, bottom(trunk, seqs))

    with patch.object(Trunk, "bottom", later), patch.object(Body, "_hidden", whole):
        yield


@contextmanager
def front_in_each_row(_: PPO) -> Iterator[None]:
    with (
        patch("ppolite.models.sequences.common_prefix", lambda _: 0),
        patch("ppolite.rollout.prefill.common_prefix", lambda _, keep: 0),  # noqa: ARG005
    ):
        yield


WAYS = {
    "bottom run once, kept": Way(LEARN, bottom_each_time),
    "shared front run once a batch": Way(PHASES, front_in_each_row),
    "rows in packs": Way(LEARN, lambda ppo: patch.object(ppo.roles.trunk, "packed", False)),
    "rows that have ended leave": Way(
        GENERATE, lambda ppo: patch.object(ppo.generator, "look_every", ppo.config.max_new_tokens)
    ),
    PREPACKED: Way(GENERATE, lambda _: patch("ppolite.rollout.local.prepacking", lambda *_: 0)),
    "ppo.critic_body=policy": Way(LEARN[1:], setting=("ppo.critic_body=policy",)),
    "train.recompute=true": Way(LEARN[2:], setting=("train.recompute=true",)),
}


@dataclass
class Round:
    """Where every measurement begins."""

    ppo: PPO
    state: dict[str, Any]
    prompts: Sequence[Prompt]
    rollouts: Sequence[Rollout]

    @classmethod
    def of(cls, ppo: PPO) -> Round:
        state = copy.deepcopy(ppo.state())
        prompts = ppo.next_prompts()
        return cls(ppo, state, prompts, ppo.generate(prompts))

    def run(self, names: Sequence[str], *, count: bool) -> dict[str, Phase]:
        """Do the named phases and what they need, from the beginning."""
        ppo, phases = self.begin(), {name: Phase() for name in PHASES}
        if "generate" in names:
            with measured(phases["generate"], count=count):
                ppo.generate(self.prompts)
        if "update" in names:
            learn(ppo, self.rollouts, phases, count=count)
        return {name: phases[name] for name in names}

    def begin(self) -> PPO:
        """The trainer as it was before the round, with nothing kept of one."""
        self.ppo.restore(copy.deepcopy(self.state))
        self.ppo.roles.last = None
        return self.ppo


@cache
def opened(setting: tuple[str, ...]) -> Round:
    """A round of the recipe with this setting, after a warm-up."""
    ppo = PPO(load_recipe("film", [*setting, "ppo.epochs=1", "ppo.min_rm_accuracy=0"]), BENCH)
    made = Round.of(ppo)
    made.run(LEARN, count=False)
    return made


def copies_weights() -> bool:
    """Whether the film critic's generations here lay out their weights beforehand."""
    body = opened(()).ppo.roles.policy
    return prepacking(body, body.device) > 0


def gain(way: Way, pairs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each phase with what it counts and takes without the optimisation and with it."""
    plain, better = opened(()), opened(way.setting)

    def without(*, count: bool) -> dict[str, Phase]:
        with way.off(plain.ppo):
            return plain.run(way.phases, count=count)

    counted = without(count=True), better.run(way.phases, count=True)
    timed = [(without(count=False), better.run(way.phases, count=False)) for _ in range(pairs)]
    for name in way.phases:
        off, on = ([pair[side][name].seconds for pair in timed] for side in (0, 1))
        ops_off, ops_on = (side[name].executed for side in counted)
        yield (
            name,
            {
                "counted": ops_off / ops_on,
                "tflop": {"without": ops_off / 1e12, "with": ops_on / 1e12},
                "measured": ratio(TIME, on, off),
                "seconds": {"without": off, "with": on},
            },
        )


def main() -> None:
    parser = arguments(__doc__, pairs=3)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="these optimisations")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    book = Book("gains", args)
    models(BENCH, SHORT)
    for name in args.only:
        if name == PREPACKED and not copies_weights():
            print(
                f"{name}: on this machine a generation makes no such copy (models/prepacked.py), so nothing to compare"
            )
            continue
        phases = dict(gain(WAYS[name], args.pairs))
        for phase, found in phases.items():
            times = found["measured"]
            print(
                f"{name}, {phase}: {found['counted']:.2f}× counted, {times['median']:.2f}× measured ({between(times)})",
                flush=True,
            )
        book.keep(name, phases=phases)


if __name__ == "__main__":
    main()
