"""What the policy climbs: the recipe's objective on some rows, its importance weights, the leash in the loss.

    objective    loss a token                                     policies in it
    clip         −w min(ρ A, clip(ρ, 1 − ε, 1 + ε⁺) A)            ρ = π/π_old ; w = π_old/μ
    kl           −w ρ A + β w k3(π_old‖π)                         ρ = π/π_old ; w = π_old/μ
    a2c          −A log π                                         one update on fresh rollouts
    is           −w A log π                                       w = π/μ, anew at every update

On fresh rollouts μ is π_old, so that w is 1 in `clip` and `kl`. The reference is in none of these: the leash ties
the policy to it, in the rewards or as a term of its own here.

Axes: B rows, R response tokens.
"""

from __future__ import annotations

from torch import Tensor

from ppolite.config import PPO
from ppolite.ops.kl import kl_estimate
from ppolite.ops.losses import clip_loss, kl_penalty_loss
from ppolite.ops.masked import masked_mean, masked_zero
from ppolite.ops.policy_gradient import importance_weighted_loss, policy_gradient_loss
from ppolite.types import Experience

MAXIMA = frozenset({"policy/ratio_max", "weight/max"})
"""Figures that parts and updates are summarised in by their maximum; the others are added up and averaged."""

_SURROGATE = {
    "clip_fraction": "policy/clip_fraction",
    "approx_kl": "kl/old_token",
    "ratio_mean": "policy/ratio_mean",
    "ratio_max": "policy/ratio_max",
}
_WEIGHTED = {
    "weight_mean": "weight/mean",
    "weight_max": "weight/max",
    "clip_fraction": "weight/capped_share",
    "weight_square": "weight/square",
}


def policy_loss(
    logp_BR: Tensor, known: Experience, config: PPO, *, penalty: float, leash: float, denom: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of some rows and its figures, as parts of a minibatch of `denom` tokens.

    Args:
        logp_BR: log π with the gradient.
        known: what is fixed over the epochs, the same rows.
        penalty: PPO-KL's β.
        leash: the coefficient of KL(π‖π_ref), read when the leash is in the loss.
    """
    mask_BR, advantages_BR = known.mask_BR, known.advantages_BR
    surrogate = (logp_BR, known.logprobs_BR, advantages_BR, mask_BR)
    weights_BR = known.weights_BR
    match config.objective:
        case "clip":
            loss, figures = clip_loss(
                *surrogate,
                clip=config.clip or 0.2,
                clip_high=config.clip_high,
                dual_clip=config.dual_clip,
                behaviour_weights_BR=weights_BR,
                denom=denom,
            )
        case "kl":
            loss, figures = kl_penalty_loss(
                *surrogate, beta=penalty, behaviour_weights_BR=weights_BR, denom=denom
            )
        case "a2c":
            loss, figures = policy_gradient_loss(logp_BR, advantages_BR, mask_BR, denom=denom)
        case "is":
            loss, figures = importance_weighted_loss(
                logp_BR,
                known.behaviour_logprobs_BR,
                advantages_BR,
                mask_BR,
                kind=config.weight_kind or "step",
                truncate=config.weight_cap,
                denom=denom,
            )
    names = _WEIGHTED if config.objective == "is" else _SURROGATE
    named = {names[k]: v for k, v in figures.items() if k in names} | {"policy/loss": loss.detach()}
    if config.objective == "is":
        named["kl/old_token"] = update_kl(logp_BR.detach(), known, denom=denom)
    if config.kl.where == "loss":
        # Of samples of π_old (which the weights make them), so a first-order leash, exact at ratio 1.
        kl_BR = kl_estimate(logp_BR, known.ref_logprobs_BR, config.kl.estimator)
        term = leash * masked_mean(_weighted(kl_BR, known), mask_BR, denom=denom)
        loss = loss + term
        named["leash/loss"] = term.detach()
    return loss, named


def update_kl(logp_BR: Tensor, known: Experience, *, denom: float | Tensor | None = None) -> Tensor:
    """KL(π_old‖π), nats a token, by w k3: how far the update has gone. Scalar."""
    kl_BR = kl_estimate(known.logprobs_BR, logp_BR, "k3")
    return masked_mean(_weighted(kl_BR, known), known.mask_BR, denom=denom)


def _weighted(x_BR: Tensor, known: Experience) -> Tensor:
    """Figures of μ's samples made those of π_old's."""
    return x_BR if known.weights_BR is None else masked_zero(known.weights_BR, known.mask_BR) * x_BR
