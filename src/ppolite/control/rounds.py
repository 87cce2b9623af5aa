"""One round: T steps in N environments, made into a batch to learn from.

Acting wants only the policy's outputs. Log-probs, values and the distributions of π_old are computed
afterwards, for the whole round in one forward pass; it is the pass that the first update repeats, so that a
ratio starts at 1 exactly.

    seen  = player.play(generator)            observations, actions, rewards, how episodes ended
    batch = learnable(seen, agent, config)    one row a step

Axes: T steps, N environments, D observation, A action, P parameters of a distribution; M = T·N rows of a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from ppolite.control.config import Control
from ppolite.control.nets import Agent
from ppolite.control.policy import Policy
from ppolite.control.units import RewardScale
from ppolite.ops.advantages import Steps, gae
from ppolite.ops.masked import whiten


class Round(NamedTuple):
    """What was seen. The tensors are overwritten by the next round."""

    obs_TND: Tensor
    """[T + 1, N, D], as the nets take them; the last row is where the next round starts."""
    actions_TN: Tensor
    """As drawn: a box action is not cut to its box here."""
    rewards_TN: Tensor
    terminated_TN: Tensor
    ended_TN: Tensor
    final_obs: list[tuple[int, int, NDArray[np.float32]]]
    """Step, environment, and the state that a truncated episode ended in."""
    episodes: list[tuple[float, int]]
    """Return (in true units) and length of each episode that ended."""


class Batch(NamedTuple):
    """What an update learns from, a row a step."""

    obs_MD: Tensor
    actions_M: Tensor
    logprobs_M: Tensor
    """log π_old = log μ."""
    params_MP: Tensor
    """π_old's distribution."""
    values_M: Tensor
    advantages_M: Tensor
    returns_M: Tensor
    mask_M: Tensor
    """bool, True throughout: with SAME_STEP every step counts."""

    def parts(
        self, epochs: int, count: int, generator: torch.Generator, *, normalise: bool
    ) -> Iterator[Batch]:
        """`count` minibatches in each epoch, in a new order; advantages are normalised in each (ddof 0)."""
        if count == 1:  # the order would change nothing but the rounding
            yield from itertools.repeat(self.normalised() if normalise else self, epochs)
            return
        for _ in range(epochs):
            order = torch.randperm(len(self.obs_MD), generator=generator)
            columns = [column[order].tensor_split(count) for column in self]
            for part in map(Batch._make, zip(*columns, strict=True)):
                yield part.normalised() if normalise else part

    def normalised(self) -> Batch:
        return self._replace(advantages_M=whiten(self.advantages_M, self.mask_M, shift_mean=True))


class Player:
    """Plays rounds, going on where the last one stopped, in buffers that are made once."""

    def __init__(self, envs: VectorEnv[Any, Any, Any], policy: Policy, config: Control, seed: int) -> None:
        self.envs, self.policy = envs, policy
        T, N, D = config.rollout, config.envs.count, policy.obs_size
        discrete = policy.actions.kind == "discrete"
        action = torch.zeros(T, N, dtype=torch.int64) if discrete else torch.zeros(T, N, policy.actions.size)
        end = torch.zeros(T, N, dtype=torch.bool)
        self.seen = Round(torch.zeros(T + 1, N, D), action, torch.zeros(T, N), end, end.clone(), [], [])
        self.scale = RewardScale(N, config.gamma) if config.envs.normalise_reward else None
        self.returns_N, self.lengths_N = np.zeros(N), np.zeros(N, np.int64)
        obs_ND, _ = envs.reset(seed=seed)
        self.seen.obs_TND.numpy()[-1] = policy.see(obs_ND, update=True)

    @torch.inference_mode()
    def play(self, generator: torch.Generator) -> Round:
        policy, agent = self.policy, self.policy.agent
        seen = self.seen._replace(final_obs=[], episodes=[])
        # numpy and torch look at the same memory: no step makes a tensor of its own.
        obs_TND, rewards_TN = seen.obs_TND.numpy(), seen.rewards_TN.numpy()
        terminated_TN, ended_TN = seen.terminated_TN.numpy(), seen.ended_TN.numpy()
        T, N = rewards_TN.shape
        noise_TN = agent.dist.noise(N, T, generator)
        obs_TND[0] = obs_TND[-1]
        for t in range(T):
            actions_N = agent.act(seen.obs_TND[t], noise_TN[t])
            obs_ND, rewards_N, terminated_N, truncated_N, info = self.envs.step(
                policy.actions.to_env(actions_N.numpy())
            )
            ended_N = terminated_N | truncated_N
            seen.actions_TN[t] = actions_N
            rewards_TN[t] = rewards_N if self.scale is None else self.scale(rewards_N, ended_N)
            terminated_TN[t], ended_TN[t] = terminated_N, ended_N
            obs_TND[t + 1] = policy.see(obs_ND, update=True)
            self.returns_N += rewards_N
            self.lengths_N += 1
            for n in np.flatnonzero(ended_N).tolist():
                seen.episodes.append((float(self.returns_N[n]), int(self.lengths_N[n])))
                self.returns_N[n], self.lengths_N[n] = 0.0, 0
                if not terminated_N[n]:
                    seen.final_obs.append((t, n, policy.see(info["final_obs"][n][None])[0]))
        return seen


@torch.no_grad()
def learnable(seen: Round, agent: Agent, config: Control) -> Batch:
    """The round with what π_old and its critic say about it, one row a step."""
    T, N = seen.rewards_TN.shape
    params_MP, values_M = agent(seen.obs_TND.flatten(0, 1))
    values_TN = values_M.view(T + 1, N)
    next_values_TN = values_TN[1:].clone()
    if seen.final_obs:
        t, n, obs = zip(*seen.final_obs, strict=True)
        next_values_TN[list(t), list(n)] = agent(torch.from_numpy(np.stack(obs)))[1]
    mask_NT = torch.ones(N, T, dtype=torch.bool)
    steps = Steps(
        rewards_BT=seen.rewards_TN.T,
        values_BT=values_TN[:-1].T,
        next_values_BT=next_values_TN.T,
        terminated_BT=seen.terminated_TN.T,
        ended_BT=seen.ended_TN.T,
        mask_BT=mask_NT,
    )
    advantages_NT, returns_NT = gae(steps, gamma=config.gamma, lam=config.lam)
    params_MP, actions_M = params_MP[: T * N], seen.actions_TN.flatten(0, 1)
    return Batch(
        obs_MD=seen.obs_TND[:-1].flatten(0, 1),
        actions_M=actions_M,
        logprobs_M=agent.dist.logprob(params_MP, actions_M),
        params_MP=params_MP,
        values_M=values_M[: T * N],
        advantages_M=advantages_NT.T.flatten(),
        returns_M=returns_NT.T.flatten(),
        mask_M=mask_NT.flatten(),
    )
