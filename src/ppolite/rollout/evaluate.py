"""Figures about a set of rollouts: distance to the reference, length, diversity, and before against after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ppolite.config import PPO
from ppolite.models.roles import Roles
from ppolite.obs.metrics import bootstrap_mean_ci, distinct_n
from ppolite.rollout.experience import over_batches, sequences
from ppolite.types import Rollout

Judge = Callable[[Sequence[Rollout]], list[float]]


@torch.no_grad()
def distance(roles: Roles, rollouts: Sequence[Rollout], config: PPO) -> list[float]:
    """Σ_t log π/π_ref of each response drawn from π: its mean estimates KL(π‖π_ref), nats a sequence (k1)."""
    budget = config.optim.micro_batch_tokens
    seqs = sequences(roles, rollouts, budget)
    T = config.temperature
    ours_BR = over_batches(seqs, budget, lambda s: roles.policy.logprobs(s, T)[0])
    theirs_BR = over_batches(seqs, budget, lambda s: roles.ref_logprobs(s, T))
    return torch.where(seqs.mask_BR, ours_BR - theirs_BR, 0.0).sum(1).tolist()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def length(rollouts: Sequence[Rollout]) -> float:
    """Mean response length, tokens."""
    return mean([len(r.response_ids) for r in rollouts])


def before_and_after(
    before: Sequence[Rollout],
    after: Sequence[Rollout],
    score: Callable[[Sequence[Rollout]], list[float]] | None,
    judge: Judge | None,
    *,
    seed: int,
    samples: int,
) -> dict[str, Any]:
    """The reference's answers beside the policy's, prompt by prompt. Figures without a source are null."""
    result: dict[str, Any] = {"prompts": len(after)}
    columns: dict[str, list[float]] = {}
    for name, source in {"score": score, "judge": judge}.items():
        for when, rollouts in {"before": before, "after": after}.items():
            columns[f"{name}_{when}"] = values = source(rollouts) if source else []
            result[f"{name}_{when}"] = mean(values) if values else None
    for name in ("score", "judge"):
        gain = [a - b for a, b in zip(columns[f"{name}_after"], columns[f"{name}_before"], strict=True)]
        result[f"{name}_gain_ci95"] = list(bootstrap_mean_ci(gain, seed=seed)) if gain else None
    for when, rollouts in {"before": before, "after": after}.items():
        result[f"length_{when}"] = length(rollouts)
        result[f"distinct2_{when}"] = distinct_n([r.text for r in rollouts], 2)
        result[f"cut_share_{when}"] = mean([float(r.finish == "length") for r in rollouts])
    result["samples"] = [
        {"prompt": b.prompt.last, "before": b.text, "after": a.text}
        | {key: values[i] for key, values in columns.items() if values}
        for i, (b, a) in enumerate(zip(before[:samples], after[:samples], strict=True))
    ]
    return result
