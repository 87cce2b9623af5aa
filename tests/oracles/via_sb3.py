"""stable-baselines3's own rollout and training code, on a stand-in for its `self`: numbers in place of nets.

    collect   `OnPolicyAlgorithm.collect_rollouts`: the buffer as PPO and A2C see it, truncations and all
    train     `PPO.train` or `A2C.train`: one pass over one batch, what it logs, and the gradients

Its buffers are float32.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor, nn

from ppolite.ops.advantages import Steps

CPU = torch.device("cpu")
# Observations are numbers of states, kept exactly.
OBSERVATION, ACTION = spaces.Box(-1, 1e6, (1,), np.float32), spaces.Discrete(2)


class _Script:
    """An environment that plays back steps without gaps, and a policy whose critic knows every state's value."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.t = steps, 0
        self.num_envs, T = steps.rewards_BT.shape
        self.state = np.arange(self.num_envs * T).reshape(self.num_envs, T)  # before the step
        self.beyond = self.state + self.state.size  # what an ended step led to
        # NaN beyond a terminal state is not for SB3, which multiplies by 0.
        self.table = torch.cat([steps.values_BT.flatten(), steps.next_values_BT.flatten().nan_to_num()])

    def observe(self) -> np.ndarray:
        column = self.state[:, self.t] if self.t < self.state.shape[1] else self.beyond[:, -1]
        return column.astype(np.float32)[:, None]

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        s, t = self.steps, self.t
        self.t += 1
        ended, terminated = s.ended_BT[:, t].numpy(), s.terminated_BT[:, t].numpy()
        infos: list[dict[str, Any]] = [
            {
                "terminal_observation": np.array([beyond], np.float32),
                "TimeLimit.truncated": not over,
            }
            if end
            else {}
            for end, over, beyond in zip(ended, terminated, self.beyond[:, t], strict=True)
        ]
        return self.observe(), s.rewards_BT[:, t].numpy().copy(), ended, infos

    def predict_values(self, observation: Tensor) -> Tensor:
        return self.table[observation.long().flatten()][:, None]

    def __call__(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        zeros = torch.zeros(len(observation))
        return zeros.long(), self.predict_values(observation), zeros

    def obs_to_tensor(self, observation: np.ndarray) -> tuple[Tensor, bool]:
        return torch.as_tensor(observation), False

    def set_training_mode(self, mode: bool) -> None:
        pass


def collect(steps: Steps, gamma: float, lam: float) -> RolloutBuffer:
    """The buffer after a rollout: rewards, advantages, returns, each [T, B]."""
    script = _Script(steps)
    B, T = steps.rewards_BT.shape
    buffer = RolloutBuffer(T, OBSERVATION, ACTION, CPU, gae_lambda=lam, gamma=gamma, n_envs=B)
    algorithm = SimpleNamespace(
        policy=script,
        device=CPU,
        use_sde=False,
        action_space=ACTION,
        gamma=gamma,
        num_timesteps=0,
        _last_obs=script.observe(),
        _last_episode_starts=np.ones(B, bool),
        _update_info_buffer=lambda infos, dones: None,
    )
    nothing = lambda *args: True  # noqa: E731
    callback = SimpleNamespace(
        on_rollout_start=nothing, update_locals=nothing, on_step=nothing, on_rollout_end=nothing
    )
    assert OnPolicyAlgorithm.collect_rollouts(algorithm, script, callback, buffer, T)
    return buffer


class Trained(NamedTuple):
    log: dict[str, float]
    logprob_grad: Tensor
    value_grad: Tensor


class _Policy(nn.Module):
    def __init__(self, logprobs: Tensor, values: Tensor) -> None:
        super().__init__()
        self.logprobs, self.values = nn.Parameter(logprobs.clone()), nn.Parameter(values.clone())
        self.optimizer = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)

    def set_training_mode(self, mode: bool) -> None:
        pass

    def evaluate_actions(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, None]:
        i = observations.long().flatten()
        return self.values[i], self.logprobs[i], None


def train(
    algorithm: type[PPO] | type[A2C],
    *,
    logprobs: Tensor,
    values: Tensor,
    old_logprobs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    clip: float = 0.2,
    clip_value: float | None = None,
    normalize: bool = False,
) -> Trained:
    """One gradient step that is not taken. 1-D tensors."""
    n = len(logprobs)
    buffer = RolloutBuffer(n, OBSERVATION, ACTION, CPU, n_envs=1)
    buffer.observations[:, 0, 0] = np.arange(n)
    for name, x in (
        ("log_probs", old_logprobs), ("values", old_values), ("advantages", advantages), ("returns", returns)
    ):  # fmt: skip
        getattr(buffer, name)[:, 0] = x.numpy()
    buffer.full = True
    policy, log = _Policy(logprobs.detach(), values.detach()), dict[str, Any]()
    self = SimpleNamespace(
        policy=policy,
        rollout_buffer=buffer,
        action_space=ACTION,
        _update_learning_rate=lambda optimizer: None,
        _current_progress_remaining=1.0,
        clip_range=lambda progress: clip,
        clip_range_vf=None if clip_value is None else lambda progress: clip_value,
        n_epochs=1,
        batch_size=n,
        normalize_advantage=normalize,
        ent_coef=0.0,
        vf_coef=1.0,
        target_kl=None,
        max_grad_norm=1e30,
        _n_updates=0,
        logger=SimpleNamespace(record=lambda name, value, exclude=None: log.update({name: value})),
    )
    algorithm.train(self)
    assert policy.logprobs.grad is not None
    assert policy.values.grad is not None
    return Trained(log, policy.logprobs.grad, policy.values.grad)
