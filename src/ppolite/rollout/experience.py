"""From rollouts and scores to what an update learns from.

What stays fixed over PPO's epochs is computed here, once: the frozen bottom's hidden states, log-probs under
π_old, μ and π_ref, values, per-token rewards, advantages, returns, the weights π_old/μ.

    reward_t = −β · KL_t  (estimated, when the leash is in the reward)
             + score' on the last response token

    score' = clip(scale · normalised score) − missing-EOS penalty

On rollouts of another μ the rewards are those of π_old's leash, but values, returns and advantages are of answers
as μ goes on; the weights correct the choice of tokens, and as much of what led to it as their kind covers. Figures
about π_old are means over μ's samples with the same weights, uncut; `score/*`, `length/*` and `policy/entropy` are
about the samples as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ppolite.config import PPO
from ppolite.dist import total
from ppolite.models.roles import Roles
from ppolite.models.sequences import Sequences
from ppolite.ops.advantages import Steps, gae
from ppolite.ops.importance import WeightKind, effective_sample_size, log_weights, truncated_weights
from ppolite.ops.kl import kl_estimate
from ppolite.ops.masked import masked_mean, masked_sum, whiten
from ppolite.types import Experience, NotFiniteError, Rollout, UserError


def sequences(roles: Roles, rollouts: Sequence[Rollout], budget: int) -> Sequences:
    """Rollouts as tensors, the bottom already run; the last ones are kept, since several roles ask for them."""
    if roles.last is None or [id(r) for r in roles.last[0]] != [id(r) for r in rollouts]:
        prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
        seqs = Sequences.of(prompts, responses, roles.policy.device)
        roles.last = None  # let the hidden states of the round before go
        roles.last = list(rollouts), roles.trunk.bottom(seqs, budget, roles.trunk.keep)
    return roles.last[1]


@torch.no_grad()
def over_batches(seqs: Sequences, budget: int, compute: Callable[[Sequences], Tensor]) -> Tensor:
    """`compute` on micro-batches of at most `budget` tokens, in row order again: [B] or padded [B, R]."""
    out: Tensor | None = None
    for rows in seqs.batches(budget):
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


def policy_logprobs(roles: Roles, seqs: Sequences, config: PPO) -> Tensor:
    """log π as it is now, [B, R]."""
    return over_batches(
        seqs, config.optim.micro_batch_tokens, lambda part: roles.policy.logprobs(part, config.temperature)[0]
    )


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


def behaviour_logprobs(rollouts: Sequence[Rollout], old_BR: Tensor) -> Tensor:
    """log μ by the trainer, [B, R]: what a rollout brought along, or that of π_old for a fresh one."""
    mu_BR = old_BR.clone()
    for i, rollout in enumerate(rollouts):
        if rollout.trainer_logprobs_R is not None:
            mu_BR[i, : len(rollout.response_ids)] = rollout.trainer_logprobs_R.to(old_BR)
    return mu_BR


def weight_figures(
    log_w_BR: Tensor, weights_BR: Tensor, mask_BR: Tensor, kind: WeightKind
) -> dict[str, float]:
    """Of a whole round's π_old/μ: effective sample size as a share of the round, mean, maximum, share cut.

    The sample counted is a token, or a response for weights of whole responses.
    """
    uncut_BR = truncated_weights(log_w_BR, None)
    samples_N = log_w_BR[:, 0] if kind == "trajectory" else log_w_BR[mask_BR]
    return {
        "ess/share": float(effective_sample_size(samples_N)) / len(samples_N),
        "weight/mean": float(masked_mean(uncut_BR, mask_BR)),
        "weight/max": float(uncut_BR[mask_BR].max()),
        "weight/capped_share": float(masked_mean((weights_BR < uncut_BR).float(), mask_BR)),
    }


def make_experience(
    roles: Roles, rollouts: Sequence[Rollout], scores: Sequence[float], config: PPO, beta: float
) -> tuple[Experience, Sequences]:
    """Experience, and the sequences (with cached hidden states) that it belongs to.

    `scores` are as the reward source gives them, before normalisation by `roles.norm`. Raises UserError when
    their number is not that of the rollouts, or one is not finite.
    """
    scores_B = checked_scores(scores, len(rollouts))
    budget = config.optim.micro_batch_tokens
    seqs = sequences(roles, rollouts, budget)
    device, mask_BR = seqs.ids_BT.device, seqs.mask_BR
    entropies: list[Tensor] = []
    values: list[Tensor] = []

    def old(part: Sequences) -> Tensor:
        hidden_ND = roles.policy.response_hidden(part)
        logp_BR, entropy_BR = roles.policy.logprobs(
            part, config.temperature, entropy=True, hidden_ND=hidden_ND
        )
        assert entropy_BR is not None
        entropies.append(entropy_BR[part.mask_BR])
        if roles.critic.borrows:
            values.append(roles.critic.values(part, hidden_ND=hidden_ND))
        return logp_BR

    old_BR = over_batches(seqs, budget, old)
    ref_BR = over_batches(seqs, budget, lambda part: roles.ref_logprobs(part, config.temperature))
    of_critic = (lambda _: values.pop(0)) if roles.critic.borrows else roles.critic.values
    values_BR = over_batches(seqs, budget, of_critic)
    kl_BR = kl_estimate(old_BR, ref_BR, config.kl.estimator)
    cut_B = torch.tensor([r.finish == "length" for r in rollouts], device=device)
    shaped_B = shaped_scores(roles.norm(scores_B.to(device)), cut_B, config)
    rewards_BR = token_rewards(shaped_B, kl_BR, mask_BR, beta if config.kl.where == "reward" else 0.0)
    steps = Steps.of_responses(rewards_BR, values_BR, mask_BR)
    advantages_BR, returns_BR = gae(steps, gamma=config.gamma, lam=config.lam)
    raw_advantages_BR = advantages_BR
    if config.whiten_advantages:
        advantages_BR = whiten(advantages_BR, mask_BR, shift_mean=True, total=total)
    mu_BR = behaviour_logprobs(rollouts, old_BR)
    fresh = all(r.trainer_logprobs_R is None for r in rollouts)
    kind = config.weight_kind or "step"
    log_w_BR = log_weights(old_BR, mu_BR, mask_BR, kind=kind)
    w_BR, weights_BR = truncated_weights(log_w_BR, None), truncated_weights(log_w_BR, config.weight_cap)
    sampler_BR = torch.nn.utils.rnn.pad_sequence([r.logprobs_R for r in rollouts], batch_first=True)
    gap_BR = (sampler_BR.to(device) - mu_BR).abs()[mask_BR]
    diagnostics = {
        "score/mean": float(scores_B.mean()),
        "score/std": float(scores_B.std(correction=0)),
        "reward/shaped_mean": float(shaped_B.mean()),
        "kl/ref_seq": float(masked_sum(w_BR * (old_BR - ref_BR), mask_BR)) / len(seqs),
        "kl/ref_token_k3": float(masked_mean(w_BR * kl_estimate(old_BR, ref_BR, "k3"), mask_BR)),
        "policy/entropy": float(torch.cat(entropies).mean()),
        "length/mean": float(mask_BR.sum()) / len(seqs),
        "length/cut_share": float(cut_B.float().mean()),
        "advantage/mean": float(masked_mean(raw_advantages_BR, mask_BR)),
        "value/mean": float(masked_mean(values_BR, mask_BR)),
        "sampler/gap_mean": float(gap_BR.mean()),
        "sampler/gap_max": float(gap_BR.max()),
        **source_means(rollouts),
    }
    if not fresh:
        diagnostics |= weight_figures(log_w_BR, weights_BR, mask_BR, kind)
        diagnostics["kl/behaviour_token"] = float(masked_mean(kl_estimate(mu_BR, old_BR, "k3"), mask_BR))
    experience = Experience(
        rollouts=list(rollouts), mask_BR=mask_BR, logprobs_BR=old_BR, behaviour_logprobs_BR=mu_BR,
        ref_logprobs_BR=ref_BR, values_BR=values_BR, scores_B=scores_B, rewards_BR=rewards_BR,
        advantages_BR=advantages_BR, returns_BR=returns_BR, weights_BR=None if fresh else weights_BR,
        diagnostics=diagnostics,
    )  # fmt: skip
    return experience, seqs


def source_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`reward/NAME`: the mean of what each source of `ppo.rewards` gave, in its own units; empty without sources."""
    names = [name for name in rollouts[0].rewards if all(name in r.rewards for r in rollouts)]
    return {f"reward/{name}": sum(r.rewards[name] for r in rollouts) / len(rollouts) for name in names}


def checked_scores(scores: Sequence[float], count: int) -> Tensor:
    """As a tensor [count].

    Raises NotFiniteError for one that is not finite, UserError where they are not so many, or not numbers.
    """
    if len(scores) != count:
        raise UserError(
            f"scores: got {len(scores)} for {count} rollouts; one number for each is needed, in order"
        )
    values: list[float] = []
    for i, score in enumerate(scores):
        try:
            values.append(float(score))
        except (TypeError, ValueError):
            raise UserError(f"scores: number {i} is {score!r}; expected a finite number") from None
        if not math.isfinite(values[i]):
            raise NotFiniteError(f"scores: number {i} is {score!r}; expected a finite number")
    return torch.tensor(values)
