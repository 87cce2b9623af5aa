import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppolite.ops.recurrence import ahead, backward_sum, forward_sum


def test_by_hand():
    """4; 3 + .5·4; 2 + 0·5, since nothing flows over the 0; 1 + 2·2. And the other way round."""
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    c = torch.tensor([[2.0, 0.0, 0.5, 9.0]])
    assert backward_sum(a, c).tolist() == [[5, 2, 5, 4]]
    assert forward_sum(a, c).tolist() == [[1, 4, 3, 5.5]]
    assert ahead(a).tolist() == [[2, 3, 4, 0]]
    assert ahead(a > 2).tolist() == [[False, True, True, False]]


@settings(deadline=None, derandomize=True)
@given(rows=st.integers(0, 3), columns=st.integers(0, 40), seed=st.integers(0, 999))
def test_any_length_against_loops(rows: int, columns: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    a, c = torch.randn(2, rows, columns, generator=g, dtype=torch.float64)
    c[torch.rand(rows, columns, generator=g) < 0.2] = 0
    backward, forward = backward_sum(a, c), forward_sum(a, c)
    assert backward.shape == forward.shape == (rows, columns)
    for b in range(rows):
        x, expected = 0.0, list[float]()
        for t in reversed(range(columns)):
            x = a[b, t].item() + c[b, t].item() * x
            expected.insert(0, x)
        assert backward[b].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)
        x, expected = 0.0, []
        for t in range(columns):
            x = a[b, t].item() + (c[b, t - 1].item() * x if t else 0.0)
            expected.append(x)
        assert forward[b].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_gradients_against_finite_differences():
    a, c = torch.randn(2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a.requires_grad_()
    c.requires_grad_()
    assert torch.autograd.gradcheck(backward_sum, (a, c))
    assert torch.autograd.gradcheck(forward_sum, (a, c))


def test_rounding_of_float32_is_no_worse_than_that_of_a_loop():
    a = torch.randn(4, 2048, generator=torch.Generator().manual_seed(1))
    c = torch.full_like(a, 0.99 * 0.95)
    exact = backward_sum(a.double(), c.double())
    assert (backward_sum(a, c) - exact).abs().max() < 1e-6 * exact.abs().max()
