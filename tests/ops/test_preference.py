import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppolite.ops.preference import bradley_terry_loss, pair_accuracy, plackett_luce_loss, regression_loss

NAN = math.nan


def test_bradley_terry_by_hand():
    """Scores log 3 apart: the chosen one wins with probability 3/4."""
    chosen, rejected = torch.tensor([math.log(3), 5.0]), torch.tensor([0.0, 5.0])
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(expected)
    margin = torch.tensor([math.log(3), 0.0])
    assert bradley_terry_loss(chosen, rejected, margin).item() == pytest.approx(math.log(2))
    assert bradley_terry_loss(torch.tensor([-1e4]), torch.tensor([0.0])).item() == 1e4


def test_plackett_luce_by_hand():
    """Weights 3, 2, 1 in that order: 3/6 · 2/3 · 1."""
    scores = torch.tensor([[3.0, 2.0, 1.0]]).log()
    assert plackett_luce_loss(scores, torch.ones(1, 3, dtype=torch.bool)).item() == pytest.approx(math.log(3))


def test_probabilities_of_all_rankings_add_up_to_one():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    rankings = scores[torch.tensor(list(itertools.permutations(range(4))))]
    mask = torch.ones(4, dtype=torch.bool)[None]
    p = [math.exp(-plackett_luce_loss(r[None], mask).item()) for r in rankings]
    assert math.fsum(p) == pytest.approx(1)


@given(st.integers(1, 6), st.integers(0, 999))
def test_two_ranks_are_a_pair(B: int, seed: int):
    scores = torch.randn(B, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ranking = plackett_luce_loss(scores, torch.ones(B, 2, dtype=torch.bool))
    torch.testing.assert_close(ranking, bradley_terry_loss(scores[:, 0], scores[:, 1]))


@given(st.integers(2, 6), st.integers(0, 999))
def test_absent_items_are_absent(K: int, seed: int):
    """Rows with gaps anywhere, against each row's present items alone; NaN in the gaps; gradients too."""
    g = torch.Generator().manual_seed(seed)
    clean = torch.randn(4, K, generator=g, dtype=torch.float64)
    mask = torch.rand(4, K, generator=g) < 0.6
    mask[0] = True
    scores = torch.where(mask, clean, NAN).requires_grad_()
    loss = plackett_luce_loss(scores, mask)
    loss.backward()
    full = [row[m] for row, m in zip(clean, mask, strict=True) if m.sum() >= 2]
    expected = [plackett_luce_loss(r[None], torch.ones(1, len(r), dtype=torch.bool)).item() for r in full]
    assert loss.item() == pytest.approx(sum(expected) / len(expected))
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert not scores.grad[~mask].any()


def test_gradients_against_finite_differences():
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, False, True, True], [False, True, False, False]])
    margin = torch.tensor([0.0, 0.5, 1.0, -1.0])
    assert torch.autograd.gradcheck(lambda s: plackett_luce_loss(s, mask), scores)
    assert torch.autograd.gradcheck(lambda s: bradley_terry_loss(s[0], s[1], margin), scores)


def test_parts_add_up():
    a, b = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 3.0, 1.0])
    for loss in (bradley_terry_loss, regression_loss):
        parts = [loss(a[i : i + 1], b[i : i + 1], denom=3) for i in range(3)]
        torch.testing.assert_close(torch.stack(parts).sum(), loss(a, b))


def test_regression_by_hand():
    assert regression_loss(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0])) == 5  # (1 + 9) / 2


def test_pair_accuracy_by_hand():
    targets = torch.tensor([0.0, 1.0, 3.0])
    assert pair_accuracy(torch.tensor([5.0, 6.0, 7.0]), targets, 0) == 1
    assert pair_accuracy(torch.tensor([2.0, 1.0, 2.0]), targets, 0) == 0.5  # wrong, tie, right
    assert pair_accuracy(torch.tensor([2.0, 1.0, 2.0]), targets, 2) == 0.75  # tie, right
    assert pair_accuracy(torch.tensor([2.0, 1.0, 2.0]), targets, 3) == 0.5  # tie
    assert (
        pair_accuracy(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]), 0) == 1
    )  # no pair of equals


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_exactly_the_gap_apart_count(dtype: torch.dtype):
    for low in range(60):  # tenths, of which the differences are 1 but for rounding
        targets = torch.tensor([low / 10, low / 10 + 1, (low + 10) / 10], dtype=dtype)[:: 1 + low % 2]
        assert pair_accuracy(torch.arange(len(targets)), targets, 1) == 1
    with pytest.raises(ValueError, match="lower min_gap"):
        pair_accuracy(torch.zeros(2), torch.tensor([0.1, 1.0999], dtype=dtype), 1)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=8), st.integers(0, 3))
def test_pair_accuracy_against_loops(items: list[tuple[int, int]], gap: int):
    points = []
    for (s, t), (s2, t2) in itertools.combinations(items, 2):
        if t != t2 and abs(t - t2) >= gap:
            points.append(0.5 if s == s2 else float((s > s2) == (t > t2)))
    scores, targets = torch.tensor(items, dtype=torch.float64).unbind(1)
    if points:
        assert pair_accuracy(scores, targets, gap).item() == pytest.approx(sum(points) / len(points))
    else:
        with pytest.raises(ValueError, match="lower min_gap"):
            pair_accuracy(scores, targets, gap)


def test_refusals():
    a, b = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"shapes differ: chosen \(2,\), rejected \(3,\)"):
        bradley_terry_loss(a, b)
    with pytest.raises(ValueError, match="shapes differ"):
        regression_loss(a, b)
    with pytest.raises(ValueError, match="shapes differ"):
        pair_accuracy(a, b, 0)
    with pytest.raises(ValueError, match="mask is empty"):
        bradley_terry_loss(a[:0], a[:0])
    with pytest.raises(ValueError, match="mask is empty"):
        plackett_luce_loss(torch.zeros(1, 2), torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match="min_gap is -1"):
        pair_accuracy(a, a, -1)
