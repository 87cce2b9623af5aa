import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppolite.ops.advantages import gae

NAN = math.nan


def right_padded(lengths, R):
    return torch.arange(R) < torch.tensor(lengths)[:, None]


def batch(lengths, R, seed):
    g = torch.Generator().manual_seed(seed)
    mask = right_padded(lengths, R)
    rewards, values = (torch.randn(len(lengths), R, generator=g, dtype=torch.float64) for _ in range(2))
    return torch.where(mask, rewards, NAN), torch.where(mask, values, NAN), mask


def by_loops(rewards, values, length, gamma, lam):
    """Â_t = Σ_k (γλ)^k δ_{t+k}, each sum on its own."""
    r, v = rewards[:length].tolist(), [*values[:length].tolist(), 0.0]
    deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
    return [math.fsum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(length)]


def test_by_hand():
    """γ = .9, λ = .5: δ = (.9·2 − 1, 10 − 2); Â_0 = .8 + .45·8. Not 4.8, as λ^k would have it."""
    rewards, values = torch.tensor([[0.0, 10.0, NAN]]), torch.tensor([[1.0, 2.0, NAN]])
    advantages, returns = gae(rewards, values, right_padded([2], 3), gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[4.4, 8.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[5.4, 10.0, 0.0]]))


lengths_and_width = st.integers(1, 9).flatmap(
    lambda R: st.tuples(st.lists(st.integers(0, R), min_size=1, max_size=5), st.just(R))
)


@given(lengths_and_width, st.floats(0, 1), st.floats(0, 1), st.integers(0, 999))
def test_against_loops(shape: tuple[list[int], int], gamma: float, lam: float, seed: int):
    lengths, R = shape
    rewards, values, mask = batch(lengths, R, seed)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for b, length in enumerate(lengths):
        expected = by_loops(rewards[b], values[b], length, gamma, lam)
        assert advantages[b, :length].tolist() == pytest.approx(expected)
        torch.testing.assert_close(returns[b, :length], advantages[b, :length] + values[b, :length])
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_lambda_one_is_monte_carlo():
    rewards, values, mask = batch([4, 6], 6, seed=1)
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    for b, length in enumerate([4, 6]):
        expected = [math.fsum(rewards[b, t:length].tolist()) for t in range(length)]
        assert returns[b, :length].tolist() == pytest.approx(expected)


def test_a_perfect_critic_leaves_no_advantage():
    """A reward of 1 at the end and V_t = γ^(steps to the end)."""
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    values = torch.tensor([[0.9**3, 0.9**2, 0.9, 1.0]], dtype=torch.float64)
    advantages, _ = gae(rewards, values, right_padded([4], 4), gamma=0.9, lam=0.7)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))


def test_more_padding_changes_nothing():
    rewards, values, mask = batch([3, 1], 3, seed=2)
    wide = [torch.cat([x, torch.full((2, 4), NAN)], 1) for x in (rewards, values)]
    narrow = gae(rewards, values, mask, gamma=0.99, lam=0.95)
    padded = gae(*wide, right_padded([3, 1], 7), gamma=0.99, lam=0.95)
    for a, b in zip(narrow, padded, strict=True):
        assert torch.equal(a, b[:, :3])


def test_padding_has_no_gradient():
    rewards, values, mask = batch([2, 0], 3, seed=3)
    values.requires_grad_()
    gae(rewards, values, mask, gamma=0.9, lam=0.9)[0].sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert not values.grad[~mask].any()


def test_refusals():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="row 1 of the mask has a True after a False"):
        gae(x, x, torch.tensor([[True, True, False], [False, True, True]]), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="must be equal"):
        gae(x, x, right_padded([1, 1], 4), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"expected numbers in \[0, 1\]"):
        gae(x, x, right_padded([1, 1], 3), gamma=1.1, lam=1.0)
