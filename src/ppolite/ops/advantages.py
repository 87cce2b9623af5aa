"""How much better a token was than the critic expected.

Left out: episodes that run into one another (`done` in the middle of a row) and bootstrapping beyond the last
step. A response is one episode, and it ends with its row's mask.

Axes: B sequences, R response tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ppolite.ops.masked import masked_zero

if TYPE_CHECKING:
    from torch import Tensor


def gae(
    rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

        δ_t = r_t + γ V_{t+1} − V_t ;   Â_t = δ_t + γλ Â_{t+1} = Σ_k (γλ)^k δ_{t+k} ;   R_t = Â_t + V_t

    V and Â are 0 beyond the last True place of a row: the response is over there, whatever stands in the
    padding. λ = 1 gives the discounted sum of the rewards to come, less V; λ = 0 the one-step error δ.

    Args:
        rewards_BR: r_t, received for token t.
        values_BR: V_t, expected before token t is chosen.
        mask_BR: True on the tokens of each response, from position 0 on without a gap; a row may be empty.
        gamma: discount γ per token, in [0, 1]; 1 is usual for RLHF.
        lam: λ, in [0, 1].

    Returns:
        advantages_BR and returns_BR, the latter the critic's targets; 0 at masked places.

    Raises:
        ValueError: shapes that differ, a row that is not right-padded, γ or λ outside [0, 1].
    """
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma={gamma}, lam={lam}: expected numbers in [0, 1]")
    rewards_BR, values_BR = masked_zero(rewards_BR, mask_BR), masked_zero(values_BR, mask_BR)
    _require_right_padded(mask_BR)

    next_value_B = next_advantage_B = values_BR.new_zeros(len(values_BR))
    advantages: list[Tensor] = []
    for t in reversed(range(values_BR.shape[1])):
        delta_B = rewards_BR[:, t] + gamma * next_value_B - values_BR[:, t]  # 0 in the padding
        next_advantage_B = delta_B + gamma * lam * next_advantage_B
        next_value_B = values_BR[:, t]
        advantages.append(next_advantage_B)
    advantages_BR = torch.stack(advantages[::-1], dim=1) if advantages else torch.zeros_like(values_BR)
    return advantages_BR, advantages_BR + values_BR


def _require_right_padded(mask_BR: Tensor) -> None:
    resumes_B = (mask_BR[:, 1:] & ~mask_BR[:, :-1]).any(dim=1)  # a True right after a False
    if bool(resumes_B.any()):
        row = int(resumes_B.nonzero()[0])
        raise ValueError(
            f"row {row} of the mask has a True after a False; expected right padding: True from position 0 "
            "to the end of the response"
        )
