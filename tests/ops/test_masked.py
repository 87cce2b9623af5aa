import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppolite.ops.masked import masked_mean, masked_sum, masked_var, masked_zero, places, whiten

NAN, INF = math.nan, math.inf
X = torch.tensor([[1.0, 2.0, NAN], [6.0, INF, -INF]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_hand_arithmetic():
    assert masked_sum(X, MASK) == 9
    assert masked_mean(X, MASK) == 3
    assert masked_mean(X, MASK, denom=4) == 2.25
    assert masked_var(X, MASK) == pytest.approx((4 + 1 + 9) / 3)  # ddof 0


def test_whiten_by_hand():
    scale = math.sqrt(14 / 3)
    expected = torch.tensor([[-2 / scale, -1 / scale, 0], [3 / scale, 0, 0]])
    torch.testing.assert_close(whiten(X, MASK, shift_mean=True), expected)
    torch.testing.assert_close(whiten(X, MASK, shift_mean=False), torch.where(MASK, expected + 3, 0))


def test_whitening_a_constant_is_finite():
    x = torch.full((4,), 2.0)
    assert whiten(x, torch.ones(4, dtype=torch.bool), shift_mean=True).tolist() == [0, 0, 0, 0]
    assert whiten(x, torch.ones(4, dtype=torch.bool), shift_mean=False).tolist() == [2, 2, 2, 2]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31))
def test_statistics_are_those_of_the_selected_values(rows: int, columns: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g, dtype=torch.float64) * 3 + 1
    mask = torch.rand(rows, columns, generator=g) < 0.6
    mask[0, 0] = True
    dirty = torch.where(mask, x, NAN)
    chosen = [v for v, keep in zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True) if keep]
    mean = math.fsum(chosen) / len(chosen)
    var = math.fsum((v - mean) ** 2 for v in chosen) / len(chosen)
    assert masked_mean(dirty, mask).item() == pytest.approx(mean)
    assert masked_var(dirty, mask).item() == pytest.approx(var, abs=1e-12)
    white = whiten(dirty, mask, shift_mean=True)
    assert masked_mean(white, mask).item() == pytest.approx(0, abs=1e-9)
    assert not white[~mask].any()
    if var > 1e-3:
        assert masked_var(white, mask).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("f", [masked_sum, masked_mean, masked_var])
def test_padding_has_no_gradient(f):
    x = X.clone().requires_grad_()
    f(x, MASK).backward()
    clean = torch.where(MASK, X, 0).requires_grad_()
    f(clean, MASK).backward()
    assert x.grad is not None
    assert clean.grad is not None
    assert torch.equal(x.grad, clean.grad)
    assert not x.grad[~MASK].any()


def test_whiten_passes_gradients_around_padding():
    x = X.clone().requires_grad_()
    whiten(x, MASK, shift_mean=True)[0, 0].backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_parts_add_up():
    x, mask = torch.arange(12.0).view(4, 3), torch.tensor([[True, False, True]] * 3 + [[False] * 3])
    parts = [masked_mean(x[i : i + 1], mask[i : i + 1], denom=int(mask.sum())) for i in range(4)]
    torch.testing.assert_close(torch.stack(parts).sum(), masked_mean(x, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype):
    x = X.to(dtype)
    assert {f(x, MASK).dtype for f in (masked_zero, masked_sum, masked_mean, masked_var)} == {dtype}
    assert whiten(x, MASK, shift_mean=True).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_zeroing_keeps_any_dtype(dtype: torch.dtype):
    zeroed = masked_zero(torch.ones(2, 3, dtype=dtype), MASK)
    assert zeroed.dtype == dtype
    assert zeroed.tolist() == [[1, 1, 0], [1, 0, 0]]


def test_what_a_mean_divides_by():
    assert places(MASK) == 3
    assert places(MASK, 4) == 4
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert places(none, 5.5) == 5.5
    with pytest.raises(ValueError, match="mask is empty"):
        places(none)
    with pytest.raises(ValueError, match="denom is -1"):
        places(MASK, -1)


def test_refusals():
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert masked_sum(X, none) == 0
    assert masked_mean(X, none, denom=5) == 0
    with pytest.raises(ValueError, match="mask is empty"):
        masked_mean(X, none)
    with pytest.raises(ValueError, match="mask is empty"):
        whiten(X, none, shift_mean=True)
    with pytest.raises(ValueError, match="expected bool"):
        masked_mean(X, MASK.float())
    with pytest.raises(ValueError, match="must be equal"):
        masked_mean(X, MASK[:1])
    with pytest.raises(ValueError, match="denom is 0"):
        masked_mean(X, MASK, denom=0)
