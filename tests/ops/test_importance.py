import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppolite.ops.importance import effective_sample_size, log_weights, truncated_weights

NAN = math.nan
LOG2 = math.log(2)


def test_by_hand():
    """Ratios 2, 4, (masked), ½, and 8 in the next episode."""
    new = torch.tensor([[1.0, 2.0, NAN, -1.0, 3.0]]) * LOG2 - 3
    old, mask = torch.full((1, 5), -3.0), torch.tensor([[True, True, False, True, True]])
    ended = torch.tensor([[False, False, False, True, False]])
    for kind, ends, expected in (
        ("step", None, [1, 2, 0, -1, 3]),
        ("per_decision", None, [1, 3, 0, 2, 5]),
        ("per_decision", ended, [1, 3, 0, 2, 3]),
        ("trajectory", None, [5, 5, 0, 5, 5]),
        ("trajectory", ended, [2, 2, 0, 2, 3]),
    ):
        result = log_weights(new, old, mask, kind=kind, ended_BT=ends)
        torch.testing.assert_close(result, torch.tensor([expected]) * LOG2)


@settings(deadline=None, derandomize=True)
@given(rows=st.integers(1, 3), columns=st.integers(1, 12), seed=st.integers(0, 9999))
def test_against_loops(rows: int, columns: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, rows, columns, generator=g, dtype=torch.float64)
    mask, ended = (torch.rand(rows, columns, generator=g) < p for p in (0.8, 0.2))
    new, old = torch.where(mask, new, NAN), torch.where(mask, old, math.inf)
    step, so_far, whole = (
        log_weights(new, old, mask, kind=kind, ended_BT=ended)
        for kind in ("step", "per_decision", "trajectory")
    )
    for b in range(rows):
        episode: list[int] = []
        for t in range(columns):
            if mask[b, t]:
                episode.append(t)
                assert step[b, t].item() == (new[b, t] - old[b, t]).item()
                expected = math.fsum((new[b, i] - old[b, i]).item() for i in episode)
                assert so_far[b, t].item() == pytest.approx(expected, abs=1e-10)
            if (mask[b, t] and ended[b, t]) or t + 1 == columns:
                expected = math.fsum((new[b, i] - old[b, i]).item() for i in episode)
                assert whole[b, episode].tolist() == pytest.approx([expected] * len(episode), abs=1e-10)
                episode = []
    for x in (step, so_far, whole):
        assert not x[~mask].any()


def test_weights_make_one_expectation_the_other():
    """Two steps with two actions, the second's probabilities depending on the first, enumerated.

    The whole product corrects what depends on all of the row; the product so far, what is known by then; the
    step's own ratio neither, since the first action decided which state the second is taken in.
    """
    pi, mu = tables([0.8, 0.3, 0.6]), tables([0.5, 0.6, 0.1])
    rows = [(a, b) for a in range(2) for b in range(2)]
    new, old = (torch.stack([row_logprobs(table, *row) for row in rows]) for table in (pi, mu))
    p, q = new.sum(1).exp(), old.sum(1).exp()  # of the four rows
    assert [p.sum().item(), q.sum().item()] == pytest.approx([1, 1])
    f = torch.tensor([3.0, -1.0, 4.0, 7.0], dtype=torch.float64)
    mask = torch.ones(4, 2, dtype=torch.bool)
    first = torch.tensor([1.0, 1.0, 5.0, 5.0], dtype=torch.float64)  # depends on the first action only

    def mean(kind, t, f):
        return (q * log_weights(new, old, mask, kind=kind)[:, t].exp() * f).sum().item()

    for t in (0, 1):
        assert mean("trajectory", t, f) == pytest.approx((p * f).sum().item())
    assert mean("per_decision", 1, f) == pytest.approx((p * f).sum().item())
    assert mean("per_decision", 0, first) == pytest.approx((p * first).sum().item())
    assert mean("step", 0, first) == pytest.approx((p * first).sum().item())
    assert mean("step", 1, f) != pytest.approx((p * f).sum().item(), rel=0.01)


def tables(first_of_two):
    """P(action 0) at the start, after action 0, after action 1."""
    p = torch.tensor(first_of_two, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1).log()


def row_logprobs(table, a, b):
    return torch.stack([table[0, a], table[1 + a, b]])


def test_truncation():
    log_w = torch.tensor([-1000.0, -LOG2, 0.0, LOG2, 1000.0])
    torch.testing.assert_close(truncated_weights(log_w, 1.5), torch.tensor([0, 0.5, 1, 1.5, 1.5]))
    torch.testing.assert_close(truncated_weights(log_w, None), torch.tensor([0, 0.5, 1, 2, math.inf]))
    assert torch.equal(truncated_weights(log_w, math.inf), truncated_weights(log_w, None))
    with pytest.raises(ValueError, match="the cap of the weights is 0"):
        truncated_weights(log_w, 0)


def test_effective_sample_size_by_hand():
    """Weights 1, 2, 3: 6² / 14."""
    log_w = torch.tensor([1.0, 2.0, 3.0]).log()
    assert effective_sample_size(log_w).item() == pytest.approx(36 / 14)
    for shift in (-1000, 1000):  # e^±1000 is no float
        assert effective_sample_size(log_w + shift).item() == pytest.approx(36 / 14, rel=1e-3)


def test_effective_sample_size_at_its_ends():
    assert effective_sample_size(torch.full((7,), -3.0)).item() == pytest.approx(7)
    assert effective_sample_size(torch.tensor([0.0, -50, -60, -90])).item() == pytest.approx(1)
    assert effective_sample_size(torch.tensor([0.0, 0.0, -math.inf])).item() == pytest.approx(2)
    assert effective_sample_size(torch.zeros(0)) == 0


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_effective_sample_size_is_that_of_the_coefficient_of_variation(log_w: list[float]):
    """Kish: n / (1 + cv²), with the standard deviation at ddof 0."""
    w = [math.exp(x) for x in log_w]
    mean = math.fsum(w) / len(w)
    variance = math.fsum((x - mean) ** 2 for x in w) / len(w)
    expected = len(w) / (1 + variance / mean**2)
    assert effective_sample_size(torch.tensor(log_w, dtype=torch.float64)).item() == pytest.approx(expected)


def test_effective_sample_size_of_log_normal_weights():
    """Weights e^{σz} leave e^{−σ²} of the samples: what σ² nats² of variance in log π/μ cost."""
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert effective_sample_size(0.7 * z).item() / len(z) == pytest.approx(math.exp(-0.49), rel=0.02)


def test_refusals():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="must be equal"):
        log_weights(x, torch.zeros(2, 1), x == 0)
    with pytest.raises(ValueError, match="expected 'step', 'per_decision' or 'trajectory'"):
        log_weights(x, x, x == 0, kind="sequence")
    with pytest.raises(ValueError, match=r"ended has dtype torch\.float32; expected bool"):
        log_weights(x, x, x == 0, kind="trajectory", ended_BT=x)
