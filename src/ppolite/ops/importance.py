"""Learning about π_θ from what another policy μ did: weights that make the one expectation the other.

    E_μ[w f] = E_π_θ[f] ,   w = π_θ / μ

    log_weights             log w of single steps, or multiplied up along an episode
    truncated_weights       w = min(exp log w, cap): less variance, for some bias
    effective_sample_size   how many samples of π_θ the weighted ones are worth

The longer the product, the less bias and the more variance: that of a whole response varies over many orders
of magnitude as soon as π_θ has left μ. Watch the effective sample size.

Axes: B rows (environments or responses), T steps, N samples.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from ppolite.ops.masked import masked_zero, require_bool
from ppolite.ops.recurrence import backward_sum, forward_sum

if TYPE_CHECKING:
    from torch import Tensor

WeightKind = Literal["step", "per_decision", "trajectory"]


def log_weights(
    logprobs_BT: Tensor,
    behaviour_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    kind: WeightKind = "step",
    ended_BT: Tensor | None = None,
) -> Tensor:
    """Logarithms of importance weights, nats, [B, T]; ℓ_t = log π_θ(a_t|s_t) − log μ(a_t|s_t).

        step           ℓ_t               the action is corrected, the state it was taken in is not
                                         (Degris et al. 2012, arXiv 1205.4839)
        per_decision   Σ_{i ≤ t} ℓ_i     all that led here is corrected (Precup et al. 2000)
        trajectory     Σ_i ℓ_i           the whole episode, the same weight for all its steps

    The sums are over one episode and its True places; a masked place in the middle is passed over.

    Args:
        logprobs_BT: log π_θ, nats. For `step` any shape will do.
        behaviour_logprobs_BT: log μ, nats.
        mask_BT: True on the steps that count.
        kind: which steps a weight is the product of.
        ended_BT: bool, True on the last step of an episode, for rows that hold several; by default a row is
            one. `step` does not need it.

    Returns:
        log w, 0 at masked places.

    Raises:
        ValueError: shapes that differ, an unknown `kind`.
    """
    log_BT = masked_zero(logprobs_BT, mask_BT) - masked_zero(behaviour_logprobs_BT, mask_BT)
    if kind == "step":
        return log_BT
    if ended_BT is None:
        ended_BT = torch.zeros_like(mask_BT)
    require_bool(ended=ended_BT)
    goes_on_BT = (~masked_zero(ended_BT, mask_BT)).to(log_BT.dtype)
    so_far_BT = forward_sum(log_BT, goes_on_BT)
    match kind:
        case "per_decision":
            return masked_zero(so_far_BT, mask_BT)
        case "trajectory":
            return masked_zero(so_far_BT + backward_sum(log_BT, goes_on_BT) - log_BT, mask_BT)
        case _:  # pyright: ignore[reportUnnecessaryComparison]  (a caller without a type checker)
            raise ValueError(f"weight kind {kind!r}; expected 'step', 'per_decision' or 'trajectory'")


def truncated_weights(log_weights: Tensor, cap: float | None) -> Tensor:
    """min(exp log w, cap): truncated importance sampling (Ionides 2008). Any shape → the same shape.

    Its bias is that of the tail beyond `cap`, its variance bounded by cap². None truncates nothing.

    Raises:
        ValueError: a cap that is not positive.
    """
    if cap is None:
        return torch.exp(log_weights)
    if cap <= 0:
        raise ValueError(f"the cap of the weights is {cap}; expected a number > 0, or None")
    return torch.exp(log_weights.clamp(max=math.log(cap)))


def effective_sample_size(log_weights_N: Tensor) -> Tensor:
    """n_eff = (Σ w)² / Σ w² (Kish 1965), in samples, 1 … N; divided by N the share of them. Scalar.

    N when all weights are equal, 1 when one outweighs the rest; the same for weights c·w. So many samples of
    π_θ would give a mean of about the same variance. 0 for no samples at all.

    Args:
        log_weights_N: log w, nats, any shape; with a mask, `log_weights_BT[mask_BT]`. Computed in log space:
            weights of e^±1000 do no harm.
    """
    log_N = log_weights_N.reshape(-1)
    if log_N.numel() == 0:
        return log_N.new_zeros(())
    return torch.exp(2 * log_N.logsumexp(0) - (2 * log_N).logsumexp(0))
