"""What every file here needs: who vouches for what, how close is close, and random data to agree on.

    @against("rlax", gae, dtypes=BOTH)       the test vouches for `gae`; it runs once in each dtype
    agree(ours, theirs, dtype)               1e-6 in float32, 1e-10 in float64
    random_steps, plain, segments            steps with ends of both kinds and gaps; what others can read of them
    random_tokens                            old and new logits, actions, advantages, a mask

Other libraries know no masks, or multiply by them. NaN stands wherever ours must not look, and `plain` and
`segments` take it out for theirs: a step before a gap is the last one of its segment.

Axes: B rows, T steps, N places, V choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ppolite.ops.advantages import Steps
from ppolite.ops.recurrence import ahead

NAN = math.nan
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
BOTH = (torch.float32, torch.float64)
SINGLE = (torch.float32,)
DOUBLE = (torch.float64,)

unit = st.floats(0, 1)
seeds = st.integers(0, 9999)
shapes = {"rows": st.integers(1, 3), "columns": st.integers(1, 8), "seed": seeds}


def against(by: str, *functions: Any, dtypes: tuple[torch.dtype, ...] = BOTH, note: str = "") -> Callable:
    """Marks a test as a comparison of `functions` with library `by`, run in each of `dtypes`.

    `note` is the constant or convention that the two differ by, which the test asserts.
    """

    def mark(test: Callable) -> Callable:
        test = pytest.mark.oracle(by=by, functions=functions, dtypes=dtypes, note=note)(test)
        return pytest.mark.parametrize("dtype", dtypes, ids=str)(test)

    return mark


def agree(ours: Any, theirs: Any, dtype: torch.dtype, *, scale: float = 0.0) -> None:
    """|ours − theirs| within `TOLERANCE[dtype]` of the largest of theirs.

    `scale` is for what cancels: of two numbers of that size what is left keeps their rounding.
    """
    if isinstance(ours, Tensor):
        assert ours.dtype == dtype, f"ours is {ours.dtype}"
    a, b = (
        x.detach().double() if isinstance(x, Tensor) else torch.tensor(np.array(x, float))
        for x in (ours, theirs)
    )
    assert a.shape == b.shape, f"ours {tuple(a.shape)}, theirs {tuple(b.shape)}"
    if a.numel() == 0:
        return
    bound = TOLERANCE[dtype] * max(scale, b.abs().max().item())
    distance = (a - b).abs().max().item()
    assert distance <= bound, f"apart by {distance:.3g}, allowed {bound:.3g}:\nours   {a}\ntheirs {b}"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Steps.


def random_steps(
    rows: int, columns: int, seed: int, dtype: torch.dtype, *, gaps: bool = True
) -> tuple[Steps, Tensor]:
    """Steps with terminations, truncations and gaps in the mask; and log-weights log π_θ/μ."""
    g = generator(seed)
    rewards, values, beyond, log_w = torch.randn(4, rows, columns, generator=g, dtype=dtype)
    terminated, truncated, gap = (torch.rand(rows, columns, generator=g) < 0.15 for _ in range(3))
    ended, mask = terminated | truncated, ~(gap & torch.tensor(gaps))
    goes_on = mask & ~ended & ahead(mask)
    next_values = torch.where(goes_on, ahead(values), beyond)
    next_values[terminated] = NAN
    rewards, values, next_values, log_w = (
        torch.where(mask, x, NAN) for x in (rewards, values, next_values, log_w)
    )
    return Steps(rewards, values, next_values, terminated, ended, mask), log_w


class Plain(NamedTuple):
    """Steps without a mask and without NaN: a gap and the end of the row end an episode as a truncation does."""

    rewards: Tensor
    values: Tensor
    next_values: Tensor
    done: Tensor
    terminated: Tensor


def plain(steps: Steps) -> Plain:
    rewards, values, next_values = (x.nan_to_num(nan=0.0) for x in steps[:3])
    done = steps.ended_BT | ~steps.mask_BT | ~ahead(steps.mask_BT)
    return Plain(rewards, values, next_values, done, steps.terminated_BT | ~steps.mask_BT)


class Segment(NamedTuple):
    """Consecutive steps of one episode, and nothing of another."""

    row: int
    places: list[int]
    rewards: np.ndarray
    values: np.ndarray
    """V of each step's state and of the state after the last one, which is 0 where that is terminal: T + 1."""
    terminated: bool


def segments(steps: Steps) -> Iterator[Segment]:
    seen = plain(steps)
    for b in range(len(seen.done)):
        places: list[int] = []
        for t in steps.mask_BT[b].nonzero()[:, 0].tolist():
            places.append(t)
            if seen.done[b, t]:
                terminated = bool(seen.terminated[b, t])
                last = torch.zeros_like(seen.values[b, t]) if terminated else seen.next_values[b, t]
                values = torch.cat([seen.values[b, places], last[None]])
                yield Segment(b, places, seen.rewards[b, places].numpy(), values.numpy(), terminated)
                places = []


# Tokens.


class Tokens(NamedTuple):
    """N places, each with a choice out of V."""

    new: Tensor
    """Logits of π_θ, [N, V], with a gradient."""
    old: Tensor
    """Logits of π_old."""
    behaviour: Tensor
    """Logits of μ."""
    actions: Tensor
    advantages: Tensor
    mask: Tensor

    def logprobs(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(1, self.actions[:, None])[:, 0]

    def unseen(self, x: Tensor) -> Tensor:
        """`x` with NaN where nobody may look."""
        return torch.where(self.mask, x, NAN)


def random_tokens(n: int, choices: int, seed: int, dtype: torch.dtype) -> Tokens:
    g = generator(seed)
    new, old, behaviour = torch.randn(3, n, choices, generator=g, dtype=dtype)
    actions = torch.randint(choices, (n,), generator=g)
    advantages = torch.randn(n, generator=g, dtype=dtype)
    mask = torch.rand(n, generator=g) < 0.7
    mask[0] = True
    return Tokens(new.requires_grad_(), old, behaviour, actions, advantages, mask)


def gradient(loss: Tensor, *of: Tensor) -> Any:
    grads = torch.autograd.grad(loss, of)
    return grads[0] if len(grads) == 1 else grads


bounds = st.integers(1, 63).map(lambda k: k / 64)
"""ε, exact in float32: torchrl keeps its settings there, whatever the dtype of the data."""
