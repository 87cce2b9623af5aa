"""The sums that all returns and products of weights are made of."""

from __future__ import annotations

import numpy as np
import rlax
import scipy.signal
import torch
import via_rlax
from hypothesis import given
from hypothesis import strategies as st
from oracle import against, agree, generator, seeds, unit

from ppolite.ops.recurrence import ahead, backward_sum, forward_sum


@against("rlax", backward_sum, forward_sum)
@given(columns=st.integers(1, 12), seed=seeds)
def test_by_rlax(dtype, columns, seed):
    """A discounted return whose discounts are the factors. Forward, in a mirror."""
    a, c = torch.randn(2, 1, columns, generator=generator(seed), dtype=dtype)
    zero = torch.zeros_like(a)
    agree(backward_sum(a, c)[0], via_rlax.call(rlax.discounted_returns, a[0], c[0], zero[0]), dtype)
    factors = ahead(c.flip(1))  # the first place of forward_sum takes nothing from before
    mirrored = via_rlax.call(rlax.discounted_returns, a[0].flip(0), factors[0], zero[0])
    agree(forward_sum(a, c)[0], np.flip(mirrored).copy(), dtype)


@against("scipy", backward_sum, forward_sum)
@given(rows=st.integers(1, 3), columns=st.integers(1, 40), seed=seeds, factor=unit)
def test_by_scipy(dtype, rows, columns, seed, factor):
    """`lfilter` with one factor for all steps."""
    a = torch.randn(rows, columns, generator=generator(seed), dtype=dtype)
    c = torch.full_like(a, factor)
    coefficients = [np.ones(1, a.numpy().dtype), np.array([1, -factor], a.numpy().dtype)]
    agree(forward_sum(a, c), scipy.signal.lfilter(*coefficients, a.numpy(), axis=1), dtype)
    mirrored = scipy.signal.lfilter(*coefficients, a.flip(1).numpy(), axis=1)
    agree(backward_sum(a, c), np.flip(mirrored, 1).copy(), dtype)
