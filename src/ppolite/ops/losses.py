"""PPO's losses, each returned with the diagnostics that it knows anyway.

    clip_loss         PPO-clip
    kl_penalty_loss   PPO-KL
    value_loss        the critic's

Every loss, and every diagnostic but `ratio_max`, is a sum over the True places of the mask divided by
`denom`: by default their number, else the count of the whole batch, of which this is a part. So parts are
accumulated by addition, `ratio_max` by the maximum, and the result does not depend on the parts:

    loss, diagnostics = clip_loss(..., denom=tokens_of_the_batch); loss.backward()

Three policies: π_θ learns, the proximal π_old is the one at the start of the update, the behaviour policy μ
drew the data. On fresh data μ is π_old; none of them is the reference π_ref. Advantages, old log-probs, old
values, weights and returns are data: pass them without a graph.

Axes: B sequences, R response tokens; any other shape does as well, if all arguments have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ppolite.ops.kl import kl_estimate
from ppolite.ops.masked import masked_var, masked_zero, places

if TYPE_CHECKING:
    from torch import Tensor

Diagnostics = dict[str, "Tensor"]
"""Detached scalars by name."""


def clip_loss(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    behaviour_weights_BR: Tensor | None = None,
    denom: float | Tensor | None = None,
) -> tuple[Tensor, Diagnostics]:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), negated.

        ρ = exp(log π_θ − log π_old) ;   L = min(ρ A, clip(ρ, 1 − ε, 1 + ε⁺) A) ;   loss = −mean w L
        with dual clip, where A < 0:     L = max(min(ρ A, clip(ρ, 1 − ε, 1 + ε⁺) A), c A)

    The minimum makes it a pessimistic bound: clipping binds, and takes the gradient away, only where A > 0
    and ρ > 1 + ε⁺, or A < 0 and ρ < 1 − ε. A ratio that went the wrong way keeps its gradient; a dual clip
    (Ye et al. 2020, arXiv 1912.09729, eq. 5) takes it away beyond ρ > c, so that one unlucky ratio cannot
    rule the batch.

    Args:
        logprobs_BR: log π_θ of the tokens, nats.
        old_logprobs_BR: log π_old, nats.
        advantages_BR: A.
        mask_BR: True on the tokens that count.
        clip: ε > 0.
        clip_high: ε⁺ > 0, for a bound that is wider above (Yu et al. 2025, arXiv 2503.14476, §3.1); by
            default ε.
        dual_clip: c > 1; None for none.
        behaviour_weights_BR: w = π_old/μ, for data from a μ that is not π_old (the decoupled objective of
            Hilton et al. 2022, arXiv 2110.00641), from `truncated_weights`; by default 1.
        denom: the batch's number of tokens, when this is a part of it.

    Returns:
        The loss and, detached, `clip_fraction` (where clipping binds), `approx_kl` (KL(π_old‖π_θ) a token,
        k3, weighted by w), `ratio_mean` and `ratio_max`.

    Raises:
        ValueError: shapes that differ, an empty mask without `denom`, ε ≤ 0, ε⁺ ≤ 0, c ≤ 1.
    """
    high = clip if clip_high is None else clip_high
    _require_above(0, clip=clip, clip_high=high)
    denom = places(mask_BR, denom)
    ratio, weighted, diagnostics = _surrogate(
        logprobs_BR, old_logprobs_BR, advantages_BR, mask_BR, behaviour_weights_BR, denom
    )
    free, bounded = ratio * weighted, ratio.detach().clamp(1 - clip, 1 + high) * weighted
    binds = bounded < free
    objective = torch.where(binds, bounded, free)  # the minimum; its own backward takes a dozen kernels
    if dual_clip is not None:
        _require_above(1, dual_clip=dual_clip)
        objective = torch.where(weighted < 0, torch.maximum(objective, dual_clip * weighted), objective)
        binds = binds | ((weighted < 0) & (ratio > dual_clip))
    diagnostics["clip_fraction"] = binds.sum(dtype=ratio.dtype) / denom
    return -objective.sum() / denom, diagnostics


def kl_penalty_loss(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    *,
    beta: float,
    kl_BR: Tensor | None = None,
    behaviour_weights_BR: Tensor | None = None,
    denom: float | Tensor | None = None,
) -> tuple[Tensor, Diagnostics]:
    """PPO with a KL penalty in place of the clip (Schulman et al. 2017, arXiv 1707.06347, eq. 8), negated.

        ρ = exp(log π_θ − log π_old) ;   loss = mean(−w ρ A + β KL(π_old‖π_θ))

    Without `kl_BR` the KL is estimated from the tokens by w k3 = w ((ρ − 1) − log ρ), whose value and whose
    gradient are both unbiased: the tokens are samples of μ, and w = π_old/μ makes them samples of π_old.
    `AdaptivePenalty` in `ops/kl.py` steers β.

    Args:
        beta: β ≥ 0.
        kl_BR: exact KL(π_old‖π_θ) of each step, nats, with the gradient, from `categorical_kl` or
            `gaussian_kl`. It needs no weight.

    The other arguments, diagnostics and errors are those of `clip_loss`, with no `clip_fraction`.
    """
    if beta < 0:
        raise ValueError(f"beta is {beta}; expected a number ≥ 0")
    denom = places(mask_BR, denom)
    ratio, weighted, diagnostics = _surrogate(
        logprobs_BR, old_logprobs_BR, advantages_BR, mask_BR, behaviour_weights_BR, denom
    )
    if kl_BR is None:
        kl = kl_estimate(masked_zero(old_logprobs_BR, mask_BR), masked_zero(logprobs_BR, mask_BR), "k3")
        if behaviour_weights_BR is not None:
            kl = masked_zero(behaviour_weights_BR, mask_BR) * kl
    else:
        kl = masked_zero(kl_BR, mask_BR)
    return (beta * kl - ratio * weighted).sum() / denom, diagnostics


def value_loss(
    values_BR: Tensor,
    old_values_BR: Tensor,
    returns_BR: Tensor,
    mask_BR: Tensor,
    *,
    clip: float | None,
    denom: float | Tensor | None = None,
) -> tuple[Tensor, Diagnostics]:
    """Half the squared error of the critic, pessimistic about large steps (OpenAI Baselines, ppo2).

        V_clip = V_old + clip(V − V_old, −ε, ε) ;   loss = mean ½ max((V − R)², (V_clip − R)²)

    Clipping binds where the clipped error is the larger one, and takes the gradient away there.

    Args:
        values_BR: V, with the gradient.
        old_values_BR: V before the update; read only when there is a clip.
        returns_BR: R, from `gae`.
        mask_BR: True on the tokens that count.
        clip: ε > 0, in units of the return; None for the plain error.
        denom: the batch's number of tokens, when this is a part of it.

    Returns:
        The loss and, detached, `clip_fraction` (where clipping binds).

    Raises:
        ValueError: shapes that differ, an empty mask without `denom`, ε ≤ 0.
    """
    if clip is not None and clip <= 0:
        raise ValueError(f"clip is {clip}; expected a number > 0, or None")
    denom = places(mask_BR, denom)
    values, returns = masked_zero(values_BR, mask_BR), masked_zero(returns_BR, mask_BR)
    square = (values - returns).square()
    if clip is None:
        return square.sum() / (2 * denom), {"clip_fraction": square.new_zeros(())}
    old_values = masked_zero(old_values_BR, mask_BR)
    # Not V_old + (V − V_old): its rounding made values that no bound touches count as clipped.
    clipped = values.clamp(old_values - clip, old_values + clip)
    worst = torch.maximum(square, (clipped - returns).square())
    return worst.sum() / (2 * denom), {"clip_fraction": (worst > square).sum(dtype=square.dtype) / denom}


def explained_variance(values_BR: Tensor, returns_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """1 − Var(R − V) / Var(R) over the whole mask, [B, R] each (as OpenAI Baselines has it). Scalar.

    1 for a perfect critic, 0 for one that knows the mean only, negative for a worse one; NaN when the returns
    do not vary. With V from before the update it is the critic's forecast of returns it has not learned from.
    """
    values, returns = masked_zero(values_BR, mask_BR), masked_zero(returns_BR, mask_BR)
    total = masked_var(returns, mask_BR)
    return torch.where(total > 0, 1 - masked_var(returns - values, mask_BR) / total, torch.nan)


def _surrogate(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    weights_BR: Tensor | None,
    denom: float | Tensor,
) -> tuple[Tensor, Tensor, Diagnostics]:
    """ρ (1 at masked places), w A (0 there) and the diagnostics that both of PPO's losses share.

    A weight is positive, so that it may go into the advantage: w min(ρ A, …) = min(ρ w A, …).
    """
    logprobs, old = masked_zero(logprobs_BR, mask_BR), masked_zero(old_logprobs_BR, mask_BR)
    weighted = masked_zero(advantages_BR, mask_BR)
    ratio = torch.exp(logprobs - old)
    with torch.no_grad():
        kl = kl_estimate(old, logprobs, "k3")
        if weights_BR is not None:
            weights = masked_zero(weights_BR, mask_BR)
            weighted, kl = weights * weighted, weights * kl
        counted = masked_zero(ratio, mask_BR)
        diagnostics = {
            "approx_kl": kl.sum() / denom,
            "ratio_mean": counted.sum() / denom,
            "ratio_max": counted.max(),
        }
    return ratio, weighted, diagnostics


def _require_above(bound: float, **settings: float) -> None:
    for name, value in settings.items():
        if not value > bound:
            raise ValueError(f"{name} is {value}; expected a number > {bound}")
