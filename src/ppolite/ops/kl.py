"""Kullback–Leibler divergence from samples, and the controllers that steer its coefficient β.

Two divergences matter in RLHF with PPO, and they have different controllers:

- KL(π_θ‖π_ref), nats per sequence, keeps the policy near the SFT model. Its β stands in the reward:
  `FixedLeash`, `AdaptiveLeash`.
- KL(π_old‖π_θ), nats per token, keeps an update small. Its β stands in the loss of PPO-KL: `AdaptivePenalty`.

A controller is a few numbers and one rule; `state_dict` belongs in every checkpoint, since β is learned too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

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

    for n sequences whose mean KL was measured. `horizon` is in sequences: β moves by at most 20 % in that
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

    after each policy update with d = E_t[KL(π_old‖π_θ)], for the next update.
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
            self.beta /= 2
        elif kl_token > 1.5 * self.target:
            self.beta *= 2

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
