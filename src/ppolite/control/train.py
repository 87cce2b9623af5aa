"""The loop: play a round, learn from it, log; now and then look at the policy.

Left out: several machines, and going on with an interrupted run (the longest of the shipped recipes takes three
quarters of an hour).

    ppolite control CartPole-v1 --algorithm ppo-clip
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import fmean

import torch

from ppolite.control.config import Control
from ppolite.control.envs import actions_of, make_envs, obs_size
from ppolite.control.evaluate import evaluate
from ppolite.control.learn import Figures, Learner
from ppolite.control.policy import Policy
from ppolite.control.process import one_thread, seeds
from ppolite.control.rounds import Player, Round, learnable
from ppolite.obs.sinks import MetricsLog, progress
from ppolite.types import UserError


def train(config: Control, run_dir: Path) -> Policy:
    """Learn for `config.steps` environment steps, a whole number of rounds; lines go to RUN/metrics.jsonl.

    Raises UserError: an environment that cannot be made or played, a gradient that is not finite.
    """
    for_envs, for_nets, for_noise, for_order = seeds(config.seed, "training")
    noise = torch.Generator().manual_seed(for_noise)
    size, last = config.round_size, config.whole_steps
    with (
        one_thread(),
        closing(make_envs(config, config.envs.count)) as envs,
        MetricsLog(run_dir, "control") as metrics,
    ):
        actions = actions_of(envs.single_action_space, config.env)
        policy = Policy(
            obs_size(envs), actions, config.net, normalise_obs=config.envs.normalise_obs, seed=for_nets
        )
        player = Player(envs, policy, config, for_envs)
        learner = Learner(policy.agent, config, for_order)
        diary, told = Diary(), 0
        with progress(config.algorithm, total=last) as tick:
            for steps in range(size, last + 1, size):
                with diary.busy():
                    seen = player.play(noise)
                    batch = learnable(seen, policy.agent, config)
                    updates = learner.learn(batch, left=1 - (steps - size) / last)
                diary.add(seen, updates)
                row: dict[str, float] = {}
                if _passed(config.log_every, steps, size) or steps == last:
                    row = diary.row() | learner.figures(batch) | learner.settings()
                every = config.evaluation.every
                if every and _passed(every, steps, size) and steps < last:  # `run` looks at the last one
                    row |= {f"eval/{k}": v for k, v in evaluate(policy, config).items()}
                if row:
                    metrics.log(steps, row)
                    tick(steps - told, diary.said)
                    told = steps
    return policy


class Diary:
    """What happened since the last line of metrics."""

    def __init__(self) -> None:
        self.said = ""
        """For people who watch."""
        self._clear()

    def _clear(self) -> None:
        self.updates: list[Figures] = []
        self.episodes: list[tuple[float, int]] = []
        self.steps, self.seconds = 0, 0.0

    @contextmanager
    def busy(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def add(self, seen: Round, updates: list[Figures]) -> None:
        norm = float(updates[-1]["policy/grad_norm"])
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient became {norm}; lower optim.lr, or look for rewards and observations that are not "
                "finite"
            )
        self.updates += updates
        self.episodes += seen.episodes
        self.steps += seen.rewards_TN.numel()

    def row(self) -> dict[str, float]:
        """Means over what was added since the last call (`*_max`: the largest), returns in true units."""
        columns = {k: [float(u[k]) for u in self.updates] for k in self.updates[0]}
        row = {k: max(v) if k.endswith("_max") else fmean(v) for k, v in columns.items()}
        row["time/steps_per_s"] = self.steps / self.seconds
        row["episodes"] = len(self.episodes)
        if self.episodes:
            returns, lengths = zip(*self.episodes, strict=True)
            row |= {"return/mean": fmean(returns), "return/min": min(returns), "return/max": max(returns)}
            row["length/mean"] = fmean(lengths)
            self.said = f"return {row['return/mean']:.1f}"
        self._clear()
        return row


def _passed(every: int, steps: int, size: int) -> bool:
    return steps // every > (steps - size) // every
