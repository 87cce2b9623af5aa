"""From rollouts and scores to what an update learns from.

What stays fixed over PPO's epochs is computed here, once: the frozen bottom's hidden states, log-probs under
π_old and π_ref, values, per-token rewards, advantages, returns.

    reward_t = −β · KL_t  (estimated, when the leash is in the reward)
             + score' on the last response token

    score' = clip(scale · normalised score) − missing-EOS penalty
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ppolite.config import PPO
from ppolite.models.roles import Roles
from ppolite.models.sequences import Sequences
from ppolite.ops.advantages import Steps, gae
from ppolite.ops.kl import kl_estimate
from ppolite.ops.masked import masked_mean, whiten
from ppolite.ops.packing import token_batches
from ppolite.types import Experience, Rollout, UserError


def sequences(roles: Roles, rollouts: Sequence[Rollout], budget: int) -> Sequences:
    """Rollouts as tensors, the bottom already run; the last ones are kept, since several roles ask for them."""
    if roles.last is None or [id(r) for r in roles.last[0]] != [id(r) for r in rollouts]:
        prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
        seqs = Sequences.of(prompts, responses, roles.policy.device)
        roles.last = list(rollouts), roles.trunk.bottom(seqs, budget)
    return roles.last[1]


@torch.no_grad()
def over_batches(seqs: Sequences, budget: int, compute: Callable[[Sequences], Tensor]) -> Tensor:
    """`compute` on micro-batches of at most `budget` tokens, in row order again: [B] or padded [B, R]."""
    out: Tensor | None = None
    for rows in token_batches(seqs.lengths, budget):
        part = compute(seqs.select(rows))
        pick = torch.tensor(rows, device=part.device)
        if out is None:
            shape = (len(seqs),) if part.ndim == 1 else seqs.mask_BR.shape
            out = part.new_zeros(shape)
        if part.ndim == 1:
            out[pick] = part
        else:
            out[pick, : part.shape[1]] = part
    assert out is not None
    return out


def shaped_scores(scores_B: Tensor, cut_B: Tensor, config: PPO) -> Tensor:
    """Scale, clip, and subtract the penalty from responses that never ended (`cut_B`)."""
    shaped_B = scores_B * config.reward_scale
    if config.reward_clip is not None:
        shaped_B = shaped_B.clamp(-config.reward_clip, config.reward_clip)
    return shaped_B - config.missing_eos_penalty * cut_B.float()


def token_rewards(shaped_B: Tensor, kl_BR: Tensor, mask_BR: Tensor, beta: float) -> Tensor:
    """−β KL_t on every response token, the score added on the last one, [B, R]."""
    rewards_BR = torch.where(mask_BR, -beta * kl_BR, 0.0)
    last_B = mask_BR.sum(1) - 1
    rewards_BR[torch.arange(len(last_B), device=last_B.device), last_B] += shaped_B
    return rewards_BR


def make_experience(
    roles: Roles, rollouts: Sequence[Rollout], scores: Sequence[float], config: PPO, beta: float
) -> tuple[Experience, Sequences]:
    """Experience, and the sequences (with cached hidden states) that it belongs to.

    `scores` are as the reward source gives them, before normalisation by `roles.norm`. Raises UserError when
    their number is not that of the rollouts, or one is not finite.
    """
    scores_B = _checked(scores, len(rollouts))
    budget = config.optim.micro_batch_tokens
    seqs = sequences(roles, rollouts, budget)
    device, mask_BR = seqs.ids_BT.device, seqs.mask_BR
    entropies: list[Tensor] = []

    def old(part: Sequences) -> Tensor:
        logp_BR, entropy_BR = roles.policy.logprobs(part, config.temperature, entropy=True)
        assert entropy_BR is not None
        entropies.append(entropy_BR[part.mask_BR])
        return logp_BR

    old_BR = over_batches(seqs, budget, old)
    ref_BR = over_batches(seqs, budget, lambda part: roles.ref_logprobs(part, config.temperature))
    values_BR = over_batches(seqs, budget, roles.critic.values)
    kl_BR = kl_estimate(old_BR, ref_BR, config.kl.estimator)
    cut_B = torch.tensor([r.finish == "length" for r in rollouts], device=device)
    shaped_B = shaped_scores(roles.norm(scores_B.to(device)), cut_B, config)
    rewards_BR = token_rewards(shaped_B, kl_BR, mask_BR, beta if config.kl.where == "reward" else 0.0)
    steps = Steps.of_responses(rewards_BR, values_BR, mask_BR)
    advantages_BR, returns_BR = gae(steps, gamma=config.gamma, lam=config.lam)
    raw_advantages_BR = advantages_BR
    if config.whiten_advantages:
        advantages_BR = whiten(advantages_BR, mask_BR, shift_mean=True)
    mu_BR = torch.nn.utils.rnn.pad_sequence([r.logprobs_R for r in rollouts], batch_first=True).to(device)
    gap_BR = (mu_BR - old_BR).abs()[mask_BR]
    lengths_B = mask_BR.sum(1).float()
    k1_B = torch.where(mask_BR, old_BR - ref_BR, 0.0).sum(1)
    diagnostics = {
        "score/mean": float(scores_B.mean()),
        "score/std": float(scores_B.std(correction=0)),
        "reward/shaped_mean": float(shaped_B.mean()),
        "kl/ref_seq": float(k1_B.mean()),
        "kl/ref_token_k3": float(masked_mean(kl_estimate(old_BR, ref_BR, "k3"), mask_BR)),
        "policy/entropy": float(torch.cat(entropies).mean()),
        "length/mean": float(lengths_B.mean()),
        "length/cut_share": float(cut_B.float().mean()),
        "advantage/mean": float(masked_mean(raw_advantages_BR, mask_BR)),
        "value/mean": float(masked_mean(values_BR, mask_BR)),
        "sampler/gap_mean": float(gap_BR.mean()),
        "sampler/gap_max": float(gap_BR.max()),
    }
    experience = Experience(
        rollouts=list(rollouts), mask_BR=mask_BR, logprobs_BR=old_BR, ref_logprobs_BR=ref_BR,
        values_BR=values_BR, scores_B=scores_B, rewards_BR=rewards_BR, advantages_BR=advantages_BR,
        returns_BR=returns_BR, diagnostics=diagnostics,
    )  # fmt: skip
    return experience, seqs


def _checked(scores: Sequence[float], count: int) -> Tensor:
    if len(scores) != count:
        raise UserError(
            f"scores: got {len(scores)} for {count} rollouts; one number for each is needed, in order"
        )
    values: list[float] = []
    for i, score in enumerate(scores):
        try:
            values.append(float(score))
        except (TypeError, ValueError):
            values.append(math.nan)
        if not math.isfinite(values[i]):
            raise UserError(f"scores: number {i} is {score!r}; expected a finite number")
    return torch.tensor(values)
