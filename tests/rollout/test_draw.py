"""Drawing a token: the right distribution, nothing impossible, a stream of numbers for each prompt."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from ppolite.rollout.draw import draw, uniforms
from ppolite.types import Sampling


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 1.0), (1.0, 0.8), (0.6, 0.5)]
)
def test_frequencies(temperature: float, top_p: float) -> None:
    """Chi-square against softmax, cut by hand in float64; and the log-prob is of what was drawn from."""
    logits = [2.0, -1.0, 0.5, 1.9, -30.0, 0.0]
    scaled = torch.tensor(logits, dtype=torch.float64) / temperature
    p = (scaled.exp() / scaled.exp().sum()).tolist()
    kept, mass = [], 0.0
    for token in sorted(range(6), key=lambda v: -p[v]):
        if mass < top_p:
            kept.append(token)
            mass += p[token]
    expected = [p[v] / mass if v in kept else 0.0 for v in range(6)]

    n = 20_000
    uniform_B = torch.rand(n, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(1, temperature, top_p)
    token_B, logp_B = draw(torch.tensor(logits).repeat(n, 1), uniform_B, sampling)
    counts = torch.bincount(token_B, minlength=6).tolist()
    assert all(counts[v] == 0 for v in range(6) if expected[v] < 1e-9)
    likely = [v for v in range(6) if expected[v] >= 1e-9]
    if len(likely) > 1:
        assert chisquare([counts[v] for v in likely], [expected[v] * n for v in likely]).pvalue > 1e-3
    torch.testing.assert_close(
        logp_B.double(), torch.tensor(expected, dtype=torch.float64)[token_B].log(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_the_ends_of_the_unit_interval_never_pick_the_impossible(top_p: float) -> None:
    last = 1 - 2.0**-24  # the largest float32 below 1
    row = torch.full((50_000,), -torch.inf)
    row[1000:49_000] = torch.randn(48_000, generator=torch.Generator().manual_seed(0))
    for u in (0.0, 1e-12, last, 1.0):
        token_B, logp_B = draw(row[None].clone(), torch.tensor([u]), Sampling(1, 1.0, top_p))
        assert torch.isfinite(logp_B).all()
        assert 1000 <= token_B.item() < 49_000
    sure = torch.tensor([[-torch.inf, 3.0, -torch.inf]])
    for u in (0.0, last):
        token_B, logp_B = draw(sure.clone(), torch.tensor([u]), Sampling(1, 1.0, top_p))
        assert (token_B.item(), logp_B.item()) == (1, 0.0)


def test_a_broken_policy_s_tokens_have_log_probs_that_are_no_numbers() -> None:
    logits_BV = torch.tensor([[0.0, torch.nan, 1.0], [0.0, 0.0, 50.0]])
    token_B, logp_B = draw(logits_BV, torch.tensor([0.5, 0.5]), Sampling(1))
    assert torch.isnan(logp_B).tolist() == [True, False]
    assert token_B.tolist() == [2, 2]


def test_a_tiny_top_p_is_greedy() -> None:
    logits_BV = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    token_B, logp_B = draw(logits_BV.clone(), torch.linspace(0, 0.99, 20), Sampling(1, 1.0, 1e-6))
    assert torch.equal(token_B, logits_BV.argmax(-1))
    assert not logp_B.any()


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_by_a_plain_loop(top_p: float) -> None:
    """Flat and peaked rows of a large vocabulary side by side: sets from one token to nearly all of them."""
    V = 6000
    noise_BV = torch.randn(6, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits_BV = noise_BV * torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0, 100.0], dtype=torch.float64)[:, None]
    uniform_B = torch.tensor([0.99, 0.5, 0.2, 0.9, 0.7, 0.1], dtype=torch.float64)
    token_B, logp_B = draw(logits_BV.clone(), uniform_B, Sampling(1, 1.0, top_p))
    sizes = []
    for row, u, token, logp in zip(logits_BV.softmax(-1), uniform_B, token_B, logp_B, strict=True):
        p = row.tolist()
        kept, mass = set(), 0.0
        for v in sorted(range(V), key=lambda v: -p[v]):
            if mass >= top_p:
                break
            kept.add(v)
            mass += p[v]
        sizes.append(len(kept))
        total, running, expected = mass, 0.0, -1
        for v in sorted(kept):
            running += p[v]
            if running > float(u) * total:
                expected = v
                break
        assert token == expected
        torch.testing.assert_close(logp.exp(), row[expected] / total, rtol=1e-9, atol=0)
    assert min(sizes) == 1
    assert max(sizes) > 1000


def test_streams_of_uniform_numbers() -> None:
    ids = [[7, 8], [7, 8], [9], [7, 8]]
    u = uniforms(ids, 5, 0)
    assert u.shape == (4, 5)
    assert torch.equal(u, uniforms(ids, 5, 0))
    assert torch.equal(uniforms([[9], [7, 8]], 5, 0), u[[2, 0]])  # the order of different prompts is nothing
    assert len({tuple(row.tolist()) for row in [*u, *uniforms(ids, 5, 1)]}) == 8  # copies and seeds differ
    many = uniforms([[i] for i in range(2000)], 10, 0)
    counts = torch.histc(many, 20, 0, 1)
    assert chisquare(counts.tolist()).pvalue > 1e-3
    for column in (0, 9):
        assert chisquare(torch.histc(many[:, column], 20, 0, 1).tolist()).pvalue > 1e-3
