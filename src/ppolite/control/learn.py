"""What a round teaches: epochs × minibatches of one loss, then β.

The four algorithms differ in `policy_loss` alone, and the losses are those of `ops`, with which language is
trained too.

Axes: M rows of a batch, P parameters of a distribution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.rmsprop import rmsprop

from ppolite.control.config import Control, Optim
from ppolite.control.nets import Agent
from ppolite.control.rounds import Batch
from ppolite.ops.importance import effective_sample_size
from ppolite.ops.kl import AdaptivePenalty
from ppolite.ops.losses import Diagnostics, clip_loss, explained_variance, kl_penalty_loss, value_loss
from ppolite.ops.policy_gradient import importance_weighted_loss, policy_gradient_loss

Figures = dict[str, "Tensor | float"]
"""Detached scalars of one update, by the name of their metric."""


class Learner:
    """The agent with its optimizer, its schedules and the β of PPO-KL."""

    def __init__(self, agent: Agent, config: Control, seed: int) -> None:
        self.agent, self.config = agent, config
        self.optimizer = Optimizer(agent.weights, config.optim)
        self.order = torch.Generator().manual_seed(seed)
        self.beta = config.beta or 0.0
        self.penalty = AdaptivePenalty(self.beta, config.kl_target) if config.kl_target else None
        self.clip, self.clip_high = config.clip or 0.0, config.clip_high
        self.lr = config.optim.lr

    def learn(self, batch: Batch, left: float) -> list[Figures]:
        """All updates of one round, when the share `left` of the run is still to come. Their diagnostics."""
        c, agent = self.config, self.agent
        self.lr = c.optim.lr * (left if c.optim.schedule == "linear" else 1.0)
        narrowed = left if c.clip_schedule == "linear" else 1.0
        self.clip = (c.clip or 0.0) * narrowed
        self.clip_high = None if c.clip_high is None else c.clip_high * narrowed
        updates: list[Figures] = []
        for part in batch.parts(c.epochs, c.minibatches, self.order, normalise=c.normalise_advantages):
            done = agent.forward(part.obs_MD)
            params_MP = agent.params(done)
            loss, figures = self.policy_loss(part, params_MP)
            critic_loss = self.critic_loss(part, done.values_N)
            total = loss + c.value_coef * critic_loss
            if c.entropy_coef:
                total = total - c.entropy_coef * agent.dist.entropy(params_MP).mean()
            total.backward()
            gradient = agent.backward(done)
            norm = clip_norm_(gradient, c.optim.max_grad_norm)
            self.optimizer.step(gradient, self.lr)
            named = {f"policy/{k}": v for k, v in figures.items()}
            losses = {"policy/loss": loss.detach(), "value/loss": critic_loss.detach()}
            updates.append(named | losses | {"policy/grad_norm": norm})
        if self.penalty is not None:  # the paper's rule looks at what the finished round has done
            kl = self.kl(batch)
            if math.isfinite(kl):  # else the gradient's norm tells what has happened
                self.penalty.update(kl)
            self.beta = self.penalty.beta
        return updates

    def policy_loss(self, part: Batch, params_MP: Tensor) -> tuple[Tensor, Diagnostics]:
        """A2C, is-pg, PPO-KL or PPO-clip."""
        dist, mask_M, size = self.agent.dist, part.mask_M, len(part.mask_M)
        logprobs_M = dist.logprob(params_MP, part.actions_M)
        if self.config.algorithm == "a2c":
            return policy_gradient_loss(logprobs_M, part.advantages_M, mask_M, denom=size)
        args = (logprobs_M, part.logprobs_M, part.advantages_M, mask_M)
        if self.config.algorithm == "is-pg":
            return importance_weighted_loss(*args, truncate=self.config.max_weight, denom=size)
        if self.config.algorithm == "ppo-kl":
            kl_M = dist.kl(part.params_MP, params_MP)
            return kl_penalty_loss(*args, beta=self.beta, kl_BR=kl_M, denom=size)
        return clip_loss(
            *args, clip=self.clip, clip_high=self.clip_high, dual_clip=self.config.dual_clip, denom=size
        )

    def critic_loss(self, part: Batch, values_M: Tensor) -> Tensor:
        clip, size = self.config.value_clip, len(part.mask_M)
        return value_loss(values_M, part.values_M, part.returns_M, part.mask_M, clip=clip, denom=size)[0]

    @torch.no_grad()
    def kl(self, batch: Batch) -> float:
        """KL(π_old‖π_θ) of the finished round, exact, nats a step."""
        return float(self.agent.dist.kl(batch.params_MP, self.agent(batch.obs_MD)[0]).mean())

    @torch.no_grad()
    def figures(self, batch: Batch) -> dict[str, float]:
        """Where the finished round has led, over all its steps."""
        dist = self.agent.dist
        params_MP, _ = self.agent(batch.obs_MD)
        log_w_M = dist.logprob(params_MP, batch.actions_M) - batch.logprobs_M
        return {
            "kl/old_step": float(dist.kl(batch.params_MP, params_MP).mean()),
            "policy/entropy": float(dist.entropy(params_MP).mean()),
            "weights/ess": float(effective_sample_size(log_w_M)) / len(log_w_M),
            "value/explained_variance": float(
                explained_variance(batch.values_M, batch.returns_M, batch.mask_M)
            ),
        }

    def settings(self) -> dict[str, float]:
        """What the schedules and β have come to."""
        own = {
            "a2c": {},
            "is-pg": {},
            "ppo-kl": {"penalty/beta": self.beta},
            "ppo-clip": {"policy/clip": self.clip},
        }
        wider = {} if self.clip_high is None else {"policy/clip_high": self.clip_high}
        return {"lr": self.lr, **own[self.config.algorithm], **wider}


def clip_norm_(gradient: Tensor, max_norm: float) -> float:
    """Scale down to `max_norm`, in place; the norm before."""
    norm = float(torch.linalg.vector_norm(gradient))
    if norm > max_norm:
        gradient.mul_(max_norm / norm)
    return norm


class Optimizer:
    """Adam or RMSprop (α = 0.99) on one vector, as torch computes them.

    Their classes spend more time on finding out what there is to do than on doing it: with 9,000 weights 65 µs
    an update, where the functions below take half.
    """

    def __init__(self, weights: Tensor, config: Optim) -> None:
        self.weights, self.kind, self.eps = weights.detach(), config.kind, config.eps
        self.first, self.second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.steps = torch.zeros(())

    @torch.no_grad()
    def step(self, gradient: Tensor, lr: float) -> None:
        if self.kind == "adam":
            adam(
                [self.weights], [gradient], [self.first], [self.second], [], [self.steps], fused=True, lr=lr,
                beta1=0.9, beta2=0.999, eps=self.eps, weight_decay=0.0, amsgrad=False, maximize=False,
            )  # fmt: skip
        else:
            rmsprop(
                [self.weights], [gradient], [self.second], [], [], [self.steps], foreach=False, lr=lr, alpha=0.99,
                eps=self.eps, weight_decay=0.0, momentum=0.0, centered=False,
            )  # fmt: skip
