"""The policy gradient itself, on fresh data and on another policy's, without PPO's care for small steps.

    policy_gradient_loss       A2C, REINFORCE: one update on fresh data
    importance_weighted_loss   many updates on what another policy did, weighted by π_θ/μ

Sums, `denom` and parts are as in `losses`: `weight_max` is accumulated by the maximum, `ess` not at all, the
rest by addition. Advantages and behaviour log-probs are data: pass them without a graph.

Axes: B rows, R steps or response tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ppolite.ops.importance import WeightKind, effective_sample_size, log_weights, truncated_weights
from ppolite.ops.kl import kl_estimate
from ppolite.ops.losses import Diagnostics
from ppolite.ops.masked import masked_zero, places

if TYPE_CHECKING:
    from torch import Tensor


def policy_gradient_loss(
    logprobs_BR: Tensor, advantages_BR: Tensor, mask_BR: Tensor, *, denom: float | Tensor | None = None
) -> tuple[Tensor, Diagnostics]:
    """The policy gradient with a baseline: REINFORCE (Williams 1992), A2C (Mnih et al. 2016, arXiv 1602.01783).

        loss = −mean A log π_θ

    Its value means nothing, its gradient is that of −E[A], and only on fresh data: after one update π_θ is no
    longer the policy that drew them.

    Args:
        logprobs_BR: log π_θ of what was done, nats.
        advantages_BR: A. Those of `vtrace` carry their weight already, and need no fresh data.
        mask_BR: True on the places that count.
        denom: the batch's number of places, when this is a part of it.

    Returns:
        The loss and, detached, `logprob_mean`, nats: on fresh data an estimate of minus the entropy.

    Raises:
        ValueError: shapes that differ, an empty mask without `denom`.
    """
    logprobs, advantages = masked_zero(logprobs_BR, mask_BR), masked_zero(advantages_BR, mask_BR)
    denom = places(mask_BR, denom)
    return -(advantages * logprobs).sum() / denom, {"logprob_mean": logprobs.detach().sum() / denom}


def importance_weighted_loss(
    logprobs_BR: Tensor,
    behaviour_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    *,
    kind: WeightKind = "step",
    truncate: float | None = None,
    ended_BR: Tensor | None = None,
    denom: float | Tensor | None = None,
) -> tuple[Tensor, Diagnostics]:
    """The policy gradient of π_θ on what another policy μ did (Degris et al. 2012, arXiv 1205.4839).

        loss = −mean w A log π_θ ;   w = min(π_θ / μ, cap), through which no gradient flows

    −w A ∇log π_θ is the weighted policy gradient for every kind of weight. (Through w it would be the same
    for a plain step weight, since ∇w = w ∇log π_θ. A product would bring in other steps' gradients, and a
    truncated weight would not learn beyond its cap.) w follows π_θ at each call: with many updates on the
    same data watch `ess`.

    Args:
        logprobs_BR: log π_θ of what was done, nats.
        behaviour_logprobs_BR: log μ, nats.
        advantages_BR: A.
        mask_BR: True on the places that count.
        kind: `step`, `per_decision` or `trajectory`, see `log_weights`. The latter two want [B, R], whole rows.
        truncate: the cap, > 0; None for plain weights.
        ended_BR: where episodes end, for rows that hold several, see `log_weights`.
        denom: the batch's number of places, when this is a part of it.

    Returns:
        The loss and, detached: `weight_mean` (1 in expectation), `weight_square` (mean of w², float64),
        `weight_max` and `ess` (effective sample size over `denom`; the parts' add up to an upper bound of the
        batch's, which is weight_mean²/weight_square of the added parts), all of plain weights;
        `clip_fraction` (where the cap binds); `approx_kl` (KL(μ‖π_θ) a place, k3, nats).

    Raises:
        ValueError: shapes that differ, an empty mask without `denom`, an unknown kind, a cap ≤ 0.
    """
    logprobs, behaviour = masked_zero(logprobs_BR, mask_BR), masked_zero(behaviour_logprobs_BR, mask_BR)
    with torch.no_grad():
        log_w = log_weights(logprobs, behaviour, mask_BR, kind=kind, ended_BT=ended_BR)
        plain, weights = truncated_weights(log_w, None), truncated_weights(log_w, truncate)
        count = places(mask_BR, denom)
    loss = -(weights * masked_zero(advantages_BR, mask_BR) * logprobs).sum() / count
    with torch.no_grad():
        counted = masked_zero(plain, mask_BR)
        diagnostics = {
            "weight_mean": counted.sum() / count,
            "weight_square": counted.double().square().sum() / count,
            "weight_max": counted.max(),
            "ess": effective_sample_size(log_w[mask_BR]) / count,
            "clip_fraction": masked_zero(weights < plain, mask_BR).sum(dtype=plain.dtype) / count,
            "approx_kl": kl_estimate(behaviour, logprobs, "k3").sum() / count,
        }
    return loss, diagnostics
