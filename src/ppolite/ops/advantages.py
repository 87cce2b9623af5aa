"""How good a step turned out to be: returns, and advantages over what the critic expected.

    Steps         what was seen: rewards, values, where episodes end, and how
    td            n-step returns; n = 1 is TD(0)          looks n steps ahead
    monte_carlo   the discounted sum                      looks to the end
    td_lambda     λ-returns                               a mixture of all of these
    gae           advantages, and λ-returns: the family's everyday member
    vtrace        λ-returns of π_θ from steps of another policy μ

They differ in where they stop adding rewards and ask the critic about the rest: they *bootstrap*. What they
share is `Steps`, where **terminated** and **truncated** are two things. Beyond a terminal state there is
nothing, its value is 0; an episode that was only cut (by a time limit, or by the end of the row) would have
gone on, so its last step is bootstrapped from the value of the state it led to.

    G_t = r_t + γ V(s_{t+1})   at a truncation ;   G_t = r_t   at a termination

All but `td` are the recursion x_t = a_t + c_t x_{t+1}, and have it from `backward_sum`. Results carry the graph
of their arguments; as targets and advantages of the losses they are data, so compute them without one.

Axes: B rows (environments or responses), T steps, R response tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppolite.ops.importance import truncated_weights
from ppolite.ops.masked import masked_zero, require_bool
from ppolite.ops.recurrence import ahead, backward_sum


class Steps(NamedTuple):
    """Consecutive steps of B rows, [B, T] each. A row may hold several episodes, one after another.

    Nothing flows back over the end of an episode, nor over a masked place: a step before one of those is
    treated as the row's last one is. Inside an episode next_values[t] is values[t + 1].
    """

    rewards_BT: Tensor
    """r_t, received for step t."""
    values_BT: Tensor
    """V(s_t), expected before step t."""
    next_values_BT: Tensor
    """V(s_{t+1}) of the state that step t led to, *before* any reset. Never read where it is terminal."""
    terminated_BT: Tensor
    """bool: the state that step t led to is terminal; its value is 0."""
    ended_BT: Tensor
    """bool: the episode ended after step t, terminated or truncated."""
    mask_BT: Tensor
    """bool: True counts."""

    @classmethod
    def of_responses(cls, rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor) -> Steps:
        """Responses: one episode a row, which terminates on the row's last True place.

        Args:
            rewards_BR: r_t, received for token t.
            values_BR: V_t, expected before token t is chosen.
            mask_BR: True on the tokens of each response, from position 0 on without a gap; a row may be empty.

        Raises:
            ValueError: shapes that differ, or a row that is not right-padded.
        """
        values_BR = masked_zero(values_BR, mask_BR)
        _require_right_padded(mask_BR)
        last_BR = mask_BR & ~ahead(mask_BR)
        return cls(rewards_BR, values_BR, ahead(values_BR), last_BR, last_BR, mask_BR)


def td(steps: Steps, *, gamma: float, n: int = 1) -> Tensor:
    """n-step returns (Sutton & Barto 2018, eq. 7.1); n = 1 is the target of TD(0), eq. 6.2.

        G_{t:t+n} = r_t + γ r_{t+1} + … + γ^{n−1} r_{t+n−1} + γ^n V(s_{t+n})

    An episode that terminates within the n steps leaves the sum of its rewards; one that is truncated within
    them, after k steps, the k-step return.

    Args:
        steps: what was seen.
        gamma: discount γ per step, in [0, 1].
        n: steps before bootstrapping, ≥ 1. Takes n passes over the steps.

    Returns:
        returns_BT, in units of the reward; 0 at masked places.

    Raises:
        ValueError: shapes that differ, a termination that is no end, γ outside [0, 1], n below 1.
    """
    _require_in_unit_interval(gamma=gamma)
    if n < 1:
        raise ValueError(f"n={n}: expected 1 step or more")
    seen = _read(steps)
    returns_BT = seen.rewards_BT + gamma * seen.next_values_BT
    for _ in range(min(n, returns_BT.shape[1]) - 1):
        rest_BT = torch.where(seen.goes_on_BT, ahead(returns_BT), seen.next_values_BT)
        returns_BT = seen.rewards_BT + gamma * rest_BT
    return returns_BT


def monte_carlo(steps: Steps, *, gamma: float) -> Tensor:
    """Discounted sum of the rewards to the end of the episode (Sutton & Barto 2018, eq. 3.8).

        G_t = r_t + γ r_{t+1} + γ² r_{t+2} + …

    The critic is asked only where the episode goes on unseen: at a truncation and at the end of the row.
    Arguments, result and errors as for `td_lambda`, of which it is λ = 1.
    """
    return td_lambda(steps, gamma=gamma, lam=1.0)


def td_lambda(steps: Steps, *, gamma: float, lam: float) -> Tensor:
    """λ-returns, the targets of TD(λ) (Sutton & Barto 2018, eq. 12.2; as a recursion, exercise 12.1).

        G_t = r_t + γ ((1 − λ) V(s_{t+1}) + λ G_{t+1}) = (1 − λ) Σ_n λ^{n−1} G_{t:t+n}

    λ = 0 is `td` with n = 1; λ = 1 is `monte_carlo`. The critic's value of s_t takes no part in G_t.

    Args:
        steps: what was seen.
        gamma: discount γ per step, in [0, 1].
        lam: λ, in [0, 1].

    Returns:
        returns_BT, in units of the reward; 0 at masked places.

    Raises:
        ValueError: shapes that differ, a termination that is no end, γ or λ outside [0, 1].
    """
    _require_in_unit_interval(gamma=gamma, lam=lam)
    seen = _read(steps)
    lam_BT = lam * seen.goes_on_BT.to(seen.values_BT.dtype)
    return backward_sum(seen.rewards_BT + gamma * (1 - lam_BT) * seen.next_values_BT, gamma * lam_BT)


def gae(steps: Steps, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

        δ_t = r_t + γ V(s_{t+1}) − V(s_t) ;   Â_t = δ_t + γλ Â_{t+1} = Σ_k (γλ)^k δ_{t+k} ;   R_t = Â_t + V(s_t)

    V is 0 in a terminal state, Â beyond the end of an episode. λ = 1 gives the discounted sum of the rewards
    to come, less V; λ = 0 the one-step error δ. R is the λ-return of `td_lambda`.

    Args:
        steps: what was seen.
        gamma: discount γ per step, in [0, 1]; 1 is usual for RLHF.
        lam: λ, in [0, 1].

    Returns:
        advantages_BT, and returns_BT, the critic's targets; in units of the reward, 0 at masked places.

    Raises:
        ValueError: shapes that differ, a termination that is no end, γ or λ outside [0, 1].
    """
    _require_in_unit_interval(gamma=gamma, lam=lam)
    seen = _read(steps)
    delta_BT = seen.rewards_BT + gamma * seen.next_values_BT - seen.values_BT
    advantages_BT = backward_sum(delta_BT, gamma * lam * seen.goes_on_BT.to(delta_BT.dtype))
    return advantages_BT, advantages_BT + seen.values_BT


def vtrace(
    steps: Steps,
    log_weights_BT: Tensor,
    *,
    gamma: float,
    lam: float = 1.0,
    rho_max: float = 1.0,
    c_max: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace: targets and advantages of π_θ from steps of μ (Espeholt et al. 2018, arXiv 1802.01561, eq. 1).

        ρ_t = min(ρ̄, w_t) ;   c_t = λ min(c̄, w_t) ;   w_t = π_θ(a_t|s_t) / μ(a_t|s_t)
        δ_t = ρ_t (r_t + γ V(s_{t+1}) − V(s_t)) ;   v_t − V(s_t) = δ_t + γ c_t (v_{t+1} − V(s_{t+1}))
        Â_t = ρ_t (r_t + γ (λ v_{t+1} + (1 − λ) V(s_{t+1})) − V(s_t))

    ρ̄ decides which policy's value is learned: π_θ's for ρ̄ = ∞, one between μ and π_θ otherwise. c̄ decides
    how far a surprise travels back: variance, not the limit. λ in c_t is remark 2; Â is §4.2 at λ = 1, and
    for smaller λ mixes as rlax does, so that on-policy v is `td_lambda` and Â is `gae`, for every λ.

    Args:
        steps: what was seen under μ.
        log_weights_BT: log w_t, nats, from `importance.log_weights`.
        gamma: discount γ per step, in [0, 1].
        lam: λ, in [0, 1].
        rho_max: ρ̄, > 0.
        c_max: c̄, > 0, at most ρ̄.

    Returns:
        targets_BT, v, for the critic, and advantages_BT, Â, for `policy_gradient_loss`: their weight ρ is in
        them already. In units of the reward, 0 at masked places.

    Raises:
        ValueError: shapes that differ, a termination that is no end, γ or λ outside [0, 1], or not
            0 < c̄ ≤ ρ̄.
    """
    _require_in_unit_interval(gamma=gamma, lam=lam)
    if not 0 < c_max <= rho_max:
        raise ValueError(f"c_max={c_max}, rho_max={rho_max}: expected 0 < c_max ≤ rho_max")
    seen = _read(steps)
    log_weights_BT = masked_zero(log_weights_BT, steps.mask_BT)
    rho_BT, c_BT = truncated_weights(log_weights_BT, rho_max), truncated_weights(log_weights_BT, c_max)
    delta_BT = rho_BT * (seen.rewards_BT + gamma * seen.next_values_BT - seen.values_BT)
    lam_BT = lam * seen.goes_on_BT.to(delta_BT.dtype)
    targets_BT = seen.values_BT + backward_sum(delta_BT, gamma * lam_BT * c_BT)
    rest_BT = (1 - lam_BT) * seen.next_values_BT + lam_BT * ahead(targets_BT)
    return targets_BT, rho_BT * (seen.rewards_BT + gamma * rest_BT - seen.values_BT)


class _Seen(NamedTuple):
    """`Steps`, checked, with 0 in place of all that is not to be read."""

    rewards_BT: Tensor
    values_BT: Tensor
    next_values_BT: Tensor
    goes_on_BT: Tensor
    """bool: step t + 1 is in the row, counts, and belongs to the same episode."""


def _read(steps: Steps) -> _Seen:
    rewards_BT, values_BT, next_values_BT, terminated_BT, ended_BT, mask_BT = steps
    require_bool(terminated=terminated_BT, ended=ended_BT)
    unended_BT = masked_zero(terminated_BT, mask_BT) & ~masked_zero(ended_BT, mask_BT)
    if bool(unended_BT.any()):
        row = int(unended_BT.any(dim=1).nonzero()[0])
        raise ValueError(
            f"row {row} terminates at a step that did not end; expected ended = terminated | truncated"
        )
    return _Seen(
        masked_zero(rewards_BT, mask_BT),
        masked_zero(values_BT, mask_BT),
        masked_zero(next_values_BT, mask_BT & ~terminated_BT),
        mask_BT & ~ended_BT & ahead(mask_BT),
    )


def _require_in_unit_interval(**settings: float) -> None:
    if not all(0 <= value <= 1 for value in settings.values()):
        given = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise ValueError(f"{given}: expected numbers in [0, 1]")


def _require_right_padded(mask_BR: Tensor) -> None:
    resumes_B = (mask_BR[:, 1:] & ~mask_BR[:, :-1]).any(dim=1)  # a True right after a False
    if bool(resumes_B.any()):
        row = int(resumes_B.nonzero()[0])
        raise ValueError(
            f"row {row} of the mask has a True after a False; expected right padding: True from position 0 "
            "to the end of the response"
        )
