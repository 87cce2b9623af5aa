"""Looks at held-out prompts while PPO trains, and the best policy that they have shown.

Kept is the policy with the best mean score within `max_kl` nats of the reference, and that of the start until there is
one, wherever it is. The judge looks on and has no say in that. `ppolite eval` uses other prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppolite.config import PPO
from ppolite.models.roles import Roles
from ppolite.rollout.evaluate import Judge, distance, length, mean
from ppolite.rollout.experience import source_means
from ppolite.rollout.local import LocalGenerator
from ppolite.stages.checkpoint import State
from ppolite.types import NotFiniteError, Prompt, Rollout, UserError

log = logging.getLogger("ppolite")


@dataclass
class Best:
    """A policy that may be the last one's better."""

    step: int
    score: float
    kl: float
    """To the reference, nats a sequence: at most `max_kl`, but at the start, or where that was lowered since."""
    weights: list[Tensor]
    """Those that are trained, on the CPU."""


@dataclass
class HeldOut:
    """The looks. `seed` is that of the sampling, the same at every look."""

    config: PPO
    roles: Roles
    generator: LocalGenerator
    prompts: Sequence[Prompt]
    score: Callable[[Sequence[Rollout]], list[float]]
    judge: Judge | None
    seed: int
    best: Best | None = None

    def look(self, step: int) -> dict[str, float]:
        """Score, KL to the reference, length and the judge's opinion, after that step. Keeps the best policy.

        Empty where the scores are not finite, but at the start, where that is an error.
        """
        if not self.prompts:
            raise UserError(
                f"{self.config.prompts.path}: no prompts are held out; raise ppo.prompts.held_out"
            )
        rollouts = self.generator.generate(self.prompts, self.config.sampling, seed=self.seed)
        try:
            scores = self.score(rollouts)
        except NotFiniteError as error:
            if step == 0:
                raise
            log.warning("%s. Going on without this look at held-out prompts", error)
            return {}
        result = {
            "heldout/score": mean(scores),
            "heldout/kl_ref_seq": mean(distance(self.roles, rollouts, self.config)),
            "heldout/length": length(rollouts),
            **{f"heldout/{key}": value for key, value in source_means(rollouts).items()},
        }
        if self.judge:
            result["heldout/judge"] = mean(self.judge(rollouts))
        score, kl, most = result["heldout/score"], result["heldout/kl_ref_seq"], self.config.max_kl
        better = self.best is None or self.best.kl > most or score > self.best.score
        if (kl <= most and better) or (self.best is None and step == 0):
            kept = [p.detach().to("cpu", copy=True) for p in self.roles.policy.trained()]
            self.best = Best(step, score, kl, kept)
        return result

    def put_best(self) -> Best:
        """The best policy into the body of the policy."""
        assert self.best is not None, "that of the start is kept wherever it is"
        with torch.no_grad():
            for weight, best in zip(self.roles.policy.trained(), self.best.weights, strict=True):
                weight.copy_(best)
        return self.best

    def state(self) -> State:
        return {"best": None if self.best is None else vars(self.best)}

    def restore(self, state: State) -> None:
        best: dict[str, Any] | None = state["best"]
        self.best = None if best is None else Best(**best)
