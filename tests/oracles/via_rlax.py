"""rlax's functions on torch tensors. They take one episode at a time; jax compiles each for each length."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rlax
import torch
from oracle import Segment, segments
from torch import Tensor

from ppolite.ops.advantages import Steps


@functools.cache
def _compiled(f: Callable, static: tuple[str, ...] = ()) -> Callable:
    return jax.jit(f, static_argnames=static)


def call(f: Callable, *args: Any, static: dict[str, Any] | None = None) -> Any:
    """f(*args), with tensors in and arrays out; numbers become arrays of the first argument's dtype."""
    arrays = [x.detach().numpy() if isinstance(x, Tensor) else x for x in args]
    dtype = arrays[0].dtype
    arrays = [np.asarray(x, dtype) if isinstance(x, float) else x for x in arrays]
    static = static or {}
    return jax.tree.map(np.array, _compiled(f, tuple(static))(*arrays, **static))


def by_segment(steps: Steps, f: Callable[[Segment, np.ndarray], Any], gamma: float) -> Any:
    """f(segment, discounts) of each segment, put together to [B, T], or to several of them.

    rlax knows no ends: a termination is a discount of 0.
    """
    results: list[Tensor] = []
    for segment in segments(steps):
        discounts = np.full_like(segment.rewards, gamma)
        discounts[-1] *= not segment.terminated
        parts = f(segment, discounts)
        parts = parts if isinstance(parts, tuple) else (parts,)
        results = results or [torch.zeros_like(steps.rewards_BT) for _ in parts]
        for whole, part in zip(results, parts, strict=True):
            whole[segment.row, segment.places] = torch.as_tensor(np.asarray(part), dtype=whole.dtype)
    return results or [torch.zeros_like(steps.rewards_BT)] * 2


def td(steps: Steps, gamma: float, n: int) -> Any:
    return by_segment(
        steps,
        lambda s, d: call(rlax.n_step_bootstrapped_returns, s.rewards, d, s.values[1:], static={"n": n}),
        gamma,
    )[0]


def monte_carlo(steps: Steps, gamma: float) -> Any:
    return by_segment(steps, lambda s, d: call(rlax.discounted_returns, s.rewards, d, s.values[1:]), gamma)[0]


def td_lambda(steps: Steps, gamma: float, lam: float) -> Any:
    return by_segment(steps, lambda s, d: call(rlax.lambda_returns, s.rewards, d, s.values[1:], lam), gamma)[
        0
    ]


def gae(steps: Steps, gamma: float, lam: float) -> Any:
    f = rlax.truncated_generalized_advantage_estimation
    return by_segment(steps, lambda s, d: call(f, s.rewards, d, lam, s.values), gamma)[0]


def vtrace(steps: Steps, log_w: Tensor, gamma: float, lam: float, rho_max: float) -> Any:
    """Targets and advantages; c̄ is 1."""

    def of(s: Segment, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        v, v_next, rho = s.values[:-1], s.values[1:], log_w[s.row, s.places].exp()
        out = call(rlax.vtrace_td_error_and_advantage, v, v_next, s.rewards, d, rho, lam, rho_max, rho_max)
        return v + out.errors, out.pg_advantage

    return by_segment(steps, of, gamma)
