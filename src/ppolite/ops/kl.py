"""Kullback–Leibler divergence, from samples and exact, and the controllers that steer its coefficient β.

    kl_estimate                                            from samples: k1, k2, k3
    categorical_kl, categorical_entropy                    exact, from the log-probs of all choices
    gaussian_kl, gaussian_entropy, gaussian_logprob        exact, for diagonal Gaussians
    FixedLeash, AdaptiveLeash, AdaptivePenalty             β

Two divergences matter in RLHF with PPO, and they have different controllers:

- KL(π_θ‖π_ref), nats per sequence, keeps the policy near the SFT model. Its β stands in the reward:
  `FixedLeash`, `AdaptiveLeash`.
- KL(π_old‖π_θ), nats per token, keeps an update small. Its β stands in the loss of PPO-KL: `AdaptivePenalty`.

Axes: N states or tokens (any leading axes do), V choices, A dimensions of an action.

A controller is a few numbers and one rule; `state_dict` belongs in every checkpoint, since β is learned too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_BETA, _MOST_BETA = 1e-9, 1e9
_LOG_2PI = math.log(2 * math.pi)

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logp: Tensor, logq: Tensor, kind: Estimator) -> Tensor:
    """One-sample estimates of KL(p‖q) in nats, for samples drawn from p. Any shape → the same shape.

    With log r = logq − logp (Schulman 2020, http://joschu.net/blog/kl-approx.html):

        k1 = −log r             unbiased; signed, so that a batch mean can be negative
        k2 = ½ (log r)²         ≥ 0, biased, small variance near p = q
        k3 = (r − 1) − log r    ≥ 0 and unbiased

    Elementwise, so there is no mask: reduce with `masked_mean`. In a loss, over samples of p: the gradients
    of k1 and k3 in q's parameters are unbiased for that of KL(p‖q), k2's is not; in p's parameters only k2's
    is.

    Raises:
        ValueError: unknown `kind`.
    """
    log_r = logq - logp
    match kind:
        case "k1":
            return -log_r
        case "k2":
            return log_r.square() / 2
        case "k3":
            return torch.expm1(log_r) - log_r  # expm1: r − 1 loses every digit of a small log r
        case _:  # pyright: ignore[reportUnnecessaryComparison]  (a caller without a type checker)
            raise ValueError(f"KL estimator {kind!r}; expected 'k1', 'k2' or 'k3'")


def categorical_kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """KL(p‖q) = Σ_v p_v (log p_v − log q_v), nats (Cover & Thomas 2006, §2.3). [..., V] normalised log-probs → [...].

    A choice with p_v = 0 adds nothing; one with q_v = 0 < p_v makes it infinite.
    """
    impossible_NV = logp_NV == -math.inf
    return (logp_NV.exp() * (logp_NV - logq_NV).masked_fill(impossible_NV, 0)).sum(-1)


def categorical_entropy(logp_NV: Tensor) -> Tensor:
    """H(p) = −Σ_v p_v log p_v, nats, 0 … log V (Cover & Thomas 2006, §2.1). [..., V] normalised log-probs → [...]."""
    return -(logp_NV.exp() * logp_NV.masked_fill(logp_NV == -math.inf, 0)).sum(-1)


def gaussian_kl(mean_p_NA: Tensor, log_std_p_NA: Tensor, mean_q_NA: Tensor, log_std_q_NA: Tensor) -> Tensor:
    """KL(p‖q) of diagonal Gaussians, nats: the sum over the last axis of

        log σ_q − log σ_p + (σ_p² + (μ_p − μ_q)²) / (2 σ_q²) − ½

    the relative entropy of Cover & Thomas 2006, §8.5, between normal densities. [..., A] → [...]; a log σ of [A],
    the same in every state, is broadcast.
    """
    x_NA = 2 * (log_std_p_NA - log_std_q_NA)  # σ_p²/σ_q² = eˣ; expm1, or a small step loses its digits
    distance_NA = (mean_p_NA - mean_q_NA) * torch.exp(-log_std_q_NA)
    return (torch.expm1(x_NA) - x_NA + distance_NA.square()).sum(-1) / 2


def gaussian_entropy(log_std_NA: Tensor) -> Tensor:
    """H = Σ_a (log σ_a + ½ log 2πe), nats, of a diagonal Gaussian (Cover & Thomas 2006, §8.1). [..., A] → [...].

    Below 0 for a narrow one.
    """
    return (log_std_NA + (_LOG_2PI + 1) / 2).sum(-1)


def gaussian_logprob(x_NA: Tensor, mean_NA: Tensor, log_std_NA: Tensor) -> Tensor:
    """log N(x; μ, σ²) = Σ_a (−½ ((x_a − μ_a)/σ_a)² − log σ_a − ½ log 2π), nats. [..., A] → [...]."""
    z_NA = (x_NA - mean_NA) * torch.exp(-log_std_NA)
    return -(z_NA.square() / 2 + log_std_NA + _LOG_2PI / 2).sum(-1)


@dataclass
class FixedLeash:
    """β stays as it is."""

    beta: float

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}; expected a finite number ≥ 0")

    def update(self, kl_seq: float, sequences: int) -> None:
        """Nothing to learn from the measured KL."""

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.beta = state["beta"]


@dataclass
class AdaptiveLeash:
    """Steers KL(π_θ‖π_ref) to `target` nats a sequence (Ziegler et al. 2019, arXiv 1909.08593, §2.2).

        β ← β (1 + clip(KL / target − 1, −0.2, 0.2) · n / horizon)

    for n sequences whose mean KL was measured; the paper writes a constant 0.1 where the code that was released
    with it has n / horizon. `horizon` is in sequences: β moves by at most 20 % in that
    many.
    """

    beta: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        _require_positive(beta=self.beta, target=self.target, horizon=self.horizon)

    def update(self, kl_seq: float, sequences: int) -> None:
        """Raise β where `kl_seq`, nats a sequence a mean over `sequences`, is above the target, or lower it.

        Raises:
            ValueError: `kl_seq` is not finite; or so many sequences at once that β could turn negative.
        """
        _require_finite(kl_seq)
        if sequences >= 5 * self.horizon:
            raise ValueError(
                f"{sequences} sequences in one update with a horizon of {self.horizon:g} could turn beta "
                f"negative; choose one well above {sequences / 5:g}"
            )
        error = min(max(kl_seq / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * sequences / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.beta = state["beta"]


@dataclass
class AdaptivePenalty:
    """Steers the KL(π_old‖π_θ) of an update to `target` nats a token (PPO-KL; arXiv 1707.06347, §4).

        d < target / 1.5  →  β ← β / 2 ;   d > 1.5 · target  →  β ← 2β

    after each policy update with d = E_t[KL(π_old‖π_θ)], for the next update. β stays between 1e-9 and 1e9,
    which the paper does not say: from 0 or infinity no factor leads back.
    """

    beta: float = 1.0
    target: float = 0.01

    def __post_init__(self) -> None:
        _require_positive(beta=self.beta, target=self.target)

    def update(self, kl_token: float) -> None:
        """Take d into account, measured once an update is done.

        Raises:
            ValueError: `kl_token` is not finite.
        """
        _require_finite(kl_token)
        if kl_token < self.target / 1.5:
            self.beta = max(self.beta / 2, _LEAST_BETA)
        elif kl_token > 1.5 * self.target:
            self.beta = min(self.beta * 2, _MOST_BETA)

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.beta = state["beta"]


def _require_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; expected a finite number > 0")


def _require_finite(kl: float) -> None:
    if not math.isfinite(kl):
        raise ValueError(f"the measured KL is {kl}; beta is left at its last value. Look for NaN log-probs")
