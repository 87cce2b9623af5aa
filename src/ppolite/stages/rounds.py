"""Rounds of scored rollouts, drawn by the recipe's behaviour policy μ.

    fresh    the policy draws, and learns at once
    stale    the policy draws, and learns n steps later: a queue of n rounds
    sft      the SFT model draws once; every round is a part of its samples, again and again, until `renew`

`drawn` counts the responses that have been drawn for training, whoever drew them; those of held-out prompts are
not among them. What was drawn and has no scores yet waits, in the checkpoint too, so that a reward source that fails
loses no response.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ppolite.config import PPO
from ppolite.models.roles import Roles
from ppolite.rollout.behaviour import remember, sft_samples
from ppolite.rollout.experience import checked_scores
from ppolite.rollout.local import LocalGenerator
from ppolite.rollout.record import rollout_from, rollout_state
from ppolite.stages.checkpoint import State
from ppolite.stages.opening import Opened
from ppolite.stages.rows import Cycle
from ppolite.stages.seeds import derive_seed, fingerprint_of
from ppolite.types import NotFiniteError, Prompt, Rollout, UserError

log = logging.getLogger("ppolite")


class Rounds:
    """Where `PPO` gets its rollouts. `generator` is the policy's; `score` is asked once for each response.

    Of rounds in a row whose scores are not finite, `skips` are left out.
    """

    def __init__(
        self,
        config: PPO,
        roles: Roles,
        generator: LocalGenerator,
        opened: Opened,
        prompts: Sequence[Prompt],
        score: Callable[[Sequence[Rollout]], list[float]],
        *,
        skips: int,
        seed: int,
        path: Path,
    ) -> None:
        self.config, self.roles, self.generator, self.opened = config, roles, generator, opened
        self.given, self.score, self.skips, self.seed, self.path = prompts, score, skips, seed, path
        self.calls = self.drawn = self.skipped = 0
        self.seconds = 0.0
        self._fingerprint = fingerprint_of(prompts)
        self._order = Cycle(range(len(prompts)), derive_seed(seed, "ppo-prompts"))
        self._queue: deque[list[Rollout]] = deque()
        self._waiting: list[Rollout] = []
        """Drawn, and without scores."""
        self._samples: Cycle[tuple[Rollout, float]] | None = None

    def prompts(self, count: int) -> list[Prompt]:
        """Prompts for `count` responses, each as often as it is to be answered."""
        n = self.config.samples_per_prompt
        return [self.given[place] for _ in range(count // n) for place in [next(self._order)] * n]

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
            return self._scored()
        if self._samples is None:
            self._waiting = self._waiting or self._from_sft()
            self._score_waiting()
        assert self._samples is not None
        pairs = [next(self._samples) for _ in range(self.config.rollouts)]
        return [rollout for rollout, _ in pairs], [score for _, score in pairs]

    def renew(self) -> None:
        """Replace the stored samples by as many of the current policy, which is μ from now on."""
        self._samples = None
        self._waiting = self._draw(self.config.stored)

    def _scored(self) -> tuple[list[Rollout], list[float]]:
        """The oldest round, or the next one whose scores are finite."""
        for skips in range(self.skips + 1):
            self._waiting = self._waiting or self._oldest()
            try:
                scores = self.score(self._waiting)
            except NotFiniteError as error:
                self._leave_out(self._waiting, error, skips)
                self._waiting = []
            else:
                rollouts, self._waiting = self._waiting, []
                return rollouts, scores
        raise AssertionError("the last time raises or returns")

    def _leave_out(self, rollouts: Sequence[Rollout], error: NotFiniteError, before: int) -> None:
        """A round whose scores are not finite. Raises UserError where `before` in a row were as many as may be."""
        if before == self.skips:
            times = f"{before + 1} times in a row (faults.skips is {self.skips})"
            raise UserError(f"{error}. So it was {times}: look at whatever scores") from error
        log.warning("%s. Going on without these %d", error, len(rollouts))
        self.skipped += len(rollouts)

    def _oldest(self) -> list[Rollout]:
        while len(self._queue) <= self.config.lag:
            self._queue.append(self._draw(self.config.rollouts))
        return self._queue.popleft()

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
            self.opened.generator(self.roles.reference),
            self.prompts(self.config.stored),
            self.config,
            seed=derive_seed(self.seed, "sft-samples"),
            path=self.path,
            say=log.warning,
        )
        self._count(samples if drawn else [], started)
        return samples

    def _score_waiting(self) -> None:
        """Stored samples get their scores, round by round, since so many fit into memory; then passes begin.

        Raises UserError where none of them gets finite ones.
        """
        n, in_row = self.config.rollouts, 0
        scored: list[tuple[Rollout, float]] = []
        for first in range(0, len(self._waiting), n):
            part = self._waiting[first : first + n]
            try:
                scores = checked_scores(self.score(part), len(part)).tolist()
            except NotFiniteError as error:
                self._leave_out(part, error, in_row)
                in_row += 1
            else:
                in_row = 0
                scored += zip(part, scores, strict=True)
        if not scored:
            raise UserError("no part of the stored samples has finite scores: look at whatever scores")
        self._samples = Cycle(scored, derive_seed(self.seed, "ppo-samples", self.calls))
        self._waiting = []

    def _count(self, rollouts: Sequence[Rollout], started: float) -> None:
        self.drawn += len(rollouts)
        self.seconds += time.perf_counter() - started

    # ---- checkpoints -----------------------------------------------------------------------------------------

    def state(self) -> State:
        place = {id(prompt): i for i, prompt in enumerate(self.given)}

        def kept(rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
            return [rollout_state(r, place[id(r.prompt)]) for r in rollouts]

        passes = self._samples
        return {
            "calls": self.calls,
            "drawn": self.drawn,
            "skipped": self.skipped,
            "prompts": self._fingerprint,
            "prompts_taken": self._order.taken,
            "queue": [kept(round_) for round_ in self._queue],
            "waiting": kept(self._waiting),
            "samples": None
            if passes is None
            else {
                "seed": passes.seed,
                "taken": passes.taken,
                "rollouts": kept([r for r, _ in passes.items]),
                "scores": [score for _, score in passes.items],
            },
        }

    def restore(self, state: State) -> None:
        """Raises ValueError where rollouts are kept, but the prompts are others."""

        def made(kept: list[dict[str, Any]]) -> list[Rollout]:
            if kept and state["prompts"] != self._fingerprint:
                raise ValueError(
                    "responses wait for their turn, whose prompts are not among those of the recipe"
                )
            return [rollout_from(of_one, self.given) for of_one in kept]

        self.calls, self.drawn, self.skipped = state["calls"], state["drawn"], state["skipped"]
        self._order.taken = state["prompts_taken"]
        self._queue = deque(made(round_) for round_ in state["queue"])
        self._waiting = made(state["waiting"])
        self._samples = None
        if (passes := state["samples"]) is not None:
            pairs = list(zip(made(passes["rollouts"]), passes["scores"], strict=True))
            self._samples = Cycle(pairs, passes["seed"], passes["taken"])
