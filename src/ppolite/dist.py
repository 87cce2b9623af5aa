"""Several processes with one model, each with its share of the rows: sums over all of them.

    total(x)              Σ over the processes; x itself where there is one
    mean_of_all(m, n)     of means over n items each, the mean over all
    add_gradients(…)      the same of all gradients

Losses are sums over a process's own rows, divided by the count of all rows; so the sum of the processes' gradients is
the gradient of the whole batch, however its rows are shared out. Statistics (whitening) are of the whole batch too.

These are what an update needs (`stages/update.py`). Left out: loops, checkpoints and launchers for several processes,
which `single` refuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from ppolite.types import UserError


def processes() -> int:
    """How many there are."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def total(x: Tensor) -> Tensor:
    """Σ over the processes, the same in each of them."""
    if processes() == 1:
        return x
    x = x.detach().clone()
    torch_dist.all_reduce(x)
    return x


def mean_of_all(mean: float, count: Tensor) -> float:
    """The mean over everybody's items; `mean` is that of this process's `count`, and the answer where it is alone."""
    return float(total(mean * count) / total(count)) if processes() > 1 else mean


def add_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Every gradient becomes the sum of all processes'; one without rows of its own takes part with zeros."""
    if processes() == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in grads])
    torch_dist.all_reduce(flat)
    for parameter, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = summed.view_as(parameter)


def own_rows(rows: Sequence[int]) -> list[int]:
    """Of rows of the whole round, which is dealt out in turn, those of this process, by their numbers here."""
    n, mine = processes(), rank()
    return [row // n for row in rows if row % n == mine]


def single(what: str) -> None:
    """Raises UserError where there are several processes: `what` runs in one."""
    if processes() > 1:
        raise UserError(
            f"{what} runs in one process, but {processes()} were started; several are for loops of one's own, with "
            "PPO.step"
        )
