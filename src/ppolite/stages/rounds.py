"""Rounds of scored rollouts, drawn by the recipe's behaviour policy μ.

    fresh    the policy draws, and learns at once
    stale    the policy draws, and learns n steps later: a queue of n rounds
    sft      the SFT model draws once; every round is a part of its samples, again and again, until `renew`

`drawn` counts the responses that have been drawn for training, whoever drew them; those of held-out prompts are
not among them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ppolite.config import PPO
from ppolite.models.roles import Roles
from ppolite.rollout.behaviour import behind, remember, sft_samples
from ppolite.rollout.experience import checked_scores
from ppolite.rollout.local import LocalGenerator
from ppolite.stages.loop import Opened, cycle, derive_seed, log
from ppolite.types import Prompt, Rollout


class Rounds:
    """Where `PPO` gets its rollouts. `generator` is the policy's; `score` is asked once for each response."""

    def __init__(
        self,
        config: PPO,
        roles: Roles,
        generator: LocalGenerator,
        opened: Opened,
        prompts: Sequence[Prompt],
        score: Callable[[Sequence[Rollout]], list[float]],
        seed: int,
        path: Path,
    ) -> None:
        self.config, self.roles, self.generator, self.opened = config, roles, generator, opened
        self.score, self.seed, self.path = score, seed, path
        self.calls = self.drawn = 0
        self.seconds = 0.0
        self._prompts = cycle(prompts, derive_seed(seed, "ppo-prompts"))
        self._queue = behind(lambda: self._draw(config.rollouts), config.lag)
        self._samples: Iterator[tuple[Rollout, float]] | None = None

    def prompts(self, count: int) -> list[Prompt]:
        """Prompts for `count` responses, each as often as it is to be answered."""
        n = self.config.samples_per_prompt
        return [p for _ in range(count // n) for p in [next(self._prompts)] * n]

    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Responses of the policy as it is; every call has a random stream of its own."""
        started = time.perf_counter()
        seed = derive_seed(self.seed, "ppo-sample", self.calls)
        rollouts = self.generator.generate(prompts, self.config.sampling, seed=seed)
        self.calls += 1
        self._count(rollouts, started)
        return rollouts

    def next(self) -> tuple[list[Rollout], list[float]]:
        """A round and its scores."""
        if not self.config.stored:
            rollouts = next(self._queue)
            return rollouts, self.score(rollouts)
        if self._samples is None:
            self._samples = self._passes(self._from_sft())
        pairs = [next(self._samples) for _ in range(self.config.rollouts)]
        return [rollout for rollout, _ in pairs], [score for _, score in pairs]

    def renew(self) -> None:
        """Replace the stored samples by as many of the current policy, which is μ from now on."""
        self._samples = self._passes(self._draw(self.config.stored))

    def _draw(self, count: int) -> list[Rollout]:
        rollouts = self.generate(self.prompts(count))
        if self.config.lag or self.config.stored:
            policy, T = self.roles.policy, self.config.temperature
            remember(self.roles, rollouts, self.config, lambda part: policy.logprobs(part, T)[0])
        return rollouts

    def _from_sft(self) -> list[Rollout]:
        started = time.perf_counter()
        samples, drawn = sft_samples(
            self.roles,
            LocalGenerator(self.roles.reference, self.opened.tokenizer, self.opened.stop_ids),
            self.prompts(self.config.stored),
            self.config,
            seed=derive_seed(self.seed, "sft-samples"),
            path=self.path,
            say=log.warning,
        )
        self._count(samples if drawn else [], started)
        return samples

    def _passes(self, samples: list[Rollout]) -> Iterator[tuple[Rollout, float]]:
        """The samples with their scores, pass after pass; scored by rounds, since so many fit into memory."""
        n = self.config.rollouts
        parts = [samples[first : first + n] for first in range(0, len(samples), n)]
        scores = [s for part in parts for s in checked_scores(self.score(part), len(part)).tolist()]
        seed = derive_seed(self.seed, "ppo-samples", self.calls)
        return cycle(list(zip(samples, scores, strict=True)), seed)

    def _count(self, rollouts: Sequence[Rollout], started: float) -> None:
        self.drawn += len(rollouts)
        self.seconds += time.perf_counter() - started
