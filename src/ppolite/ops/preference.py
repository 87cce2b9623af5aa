"""What a reward model learns from: pairs, rankings, scores. And how often it orders pairs rightly.

The losses are means over pairs, rankings or scores; `denom` is the count of the whole batch when the
arguments are a part of it.

Axes: B pairs, rankings or scores, K ranks, N items of an evaluation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import softplus

from ppolite.ops.masked import masked_mean, masked_zero

if TYPE_CHECKING:
    from torch import Tensor


def bradley_terry_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    margin_B: Tensor | None = None,
    *,
    denom: float | Tensor | None = None,
) -> Tensor:
    """−mean log σ(r_chosen − r_rejected − margin): the nats it takes to say which one people chose.

    Scores r [B] of the pairs; the margin [B], in the same units, is by how much the chosen one should win
    (Bradley & Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1; margin: Touvron et al. 2023,
    arXiv 2307.09288, eq. 2). log 2 when the scores are equal and there is no margin.

    Raises:
        ValueError: shapes that differ, or no pair at all without `denom`.
    """
    _require_same_shape(chosen=chosen_B, rejected=rejected_B, margin=margin_B)
    lead_B = chosen_B - rejected_B if margin_B is None else chosen_B - rejected_B - margin_B
    return _mean(softplus(-lead_B), denom)


def plackett_luce_loss(scores_BK: Tensor, mask_BK: Tensor, *, denom: float | Tensor | None = None) -> Tensor:
    """Negative log-likelihood of rankings, best first (Luce 1959; Plackett 1975; ListMLE, Xia et al. 2008).

        −log P(1 ≻ 2 ≻ … ≻ K) = Σ_k [ log Σ_{j ≥ k} exp s_j − s_k ]

    the probability of drawing the best from all, the next from the rest, and so on. Nats a ranking; K = 2 is
    Bradley–Terry.

    Args:
        scores_BK: scores s, columns in the order people gave, best first.
        mask_BK: False where a ranking has no such item, which may be any column.
        denom: the batch's number of rankings with two items or more, when this is a part of it.

    Raises:
        ValueError: shapes that differ, or no ranking of two items or more without `denom`.
    """
    s_BK = masked_zero(scores_BK, mask_BK)
    K = s_BK.shape[1]
    # [b, k, j]: item j is among those that k was drawn from. The diagonal stays, so that no row is −∞
    # throughout.
    rest_BKK = mask_BK[:, None, :] & torch.ones(K, K, dtype=torch.bool, device=s_BK.device).triu()
    rest_BKK = rest_BKK | torch.eye(K, dtype=torch.bool, device=s_BK.device)
    lse_BK = s_BK[:, None, :].expand(-1, K, -1).masked_fill(~rest_BKK, -torch.inf).logsumexp(-1)
    loss_B = masked_zero(lse_BK - s_BK, mask_BK).sum(1)
    return masked_mean(loss_B, mask_BK.sum(1) >= 2, denom=denom)


def regression_loss(pred_B: Tensor, target_B: Tensor, *, denom: float | Tensor | None = None) -> Tensor:
    """Mean squared error, mean (pred − target)², in squared score units (no ½). Scores [B].

    Raises:
        ValueError: shapes that differ, or no score at all without `denom`.
    """
    _require_same_shape(pred=pred_B, target=target_B)
    return _mean((pred_B - target_B).square(), denom)


def pair_accuracy(scores_N: Tensor, targets_N: Tensor, min_gap: float) -> Tensor:
    """The share of pairs that `scores_N` puts in the order of `targets_N`; a tie in the scores counts ½.

    Taken over all pairs whose targets differ, by at least `min_gap` (target units, ≥ 0; but for rounding, so that 2.3
    and 1.3 are 1 apart): people do not agree on pairs that are close. ½ is chance; with `min_gap` 0 this is Harrell's
    concordance index. Takes N² memory.

    Raises:
        ValueError: shapes that differ, a negative gap, or no pair so far apart.
    """
    _require_same_shape(scores=scores_N, targets=targets_N)
    if min_gap < 0:
        raise ValueError(f"min_gap is {min_gap}; expected a number ≥ 0")
    gap_NN = targets_N[:, None] - targets_N[None, :]
    rounding = 4 * torch.finfo(targets_N.dtype).eps * targets_N.abs().max()
    counts_NN = (gap_NN > 0) & (gap_NN >= min_gap - rounding)  # each pair once, the better item as the row
    if not bool(counts_NN.any()):
        raise ValueError(f"no two of {len(targets_N)} targets differ by {min_gap} or more; lower min_gap")
    right_NN = (torch.sign(scores_N[:, None] - scores_N[None, :]) + 1) / 2
    return masked_mean(right_NN, counts_NN)


def _mean(x: Tensor, denom: float | Tensor | None) -> Tensor:
    return masked_mean(x, torch.ones_like(x, dtype=torch.bool), denom=denom)


def _require_same_shape(**tensors: Tensor | None) -> None:
    shapes = {name: tuple(x.shape) for name, x in tensors.items() if x is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")
