"""KL divergences and entropies, sampled and exact; the leash of RLHF."""

from __future__ import annotations

import numpy as np
import pytest
import rlax
import torch
import via_rlax
import via_torchrl
from hypothesis import given
from hypothesis import strategies as st
from oracle import DOUBLE, against, agree, generator, random_tokens, seeds
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    kl_divergence,
)
from test_advantages import trl_batch
from torchrl.data import AdaptiveKLController
from torchrl.objectives import ClipPPOLoss

from ppolite.ops.kl import (
    AdaptiveLeash,
    categorical_entropy,
    categorical_kl,
    gaussian_entropy,
    gaussian_kl,
    gaussian_logprob,
    kl_estimate,
)

# rlax is compiled for each shape.
sizes = {"n": st.sampled_from([1, 4]), "choices": st.sampled_from([2, 5]), "seed": seeds}


@pytest.mark.parametrize("kind", ["k1", "k3"])
@against("trl", kl_estimate)
@given(rows=st.integers(1, 4), length=st.integers(1, 7), seed=seeds)
def test_estimates_by_trl(dtype, kind, rows, length, seed):
    """KL(π_old‖π_ref) from samples of π_old."""
    seen, _ = trl_batch(rows, seed, dtype, length, kl_estimator=kind)
    agree(kl_estimate(seen.logprobs, seen.ref_logprobs, kind), seen.kl, dtype, scale=1)


@against("torchrl", kl_estimate, note="its kl_approx is k1")
@given(**sizes)
def test_k1_by_torchrl(dtype, n, choices, seed):
    t = random_tokens(n, choices, seed, dtype)
    ours = kl_estimate(t.logprobs(t.old), t.logprobs(t.new.detach()), "k1")[t.mask].mean()
    agree(ours, via_torchrl.policy_loss(ClipPPOLoss, t, masked=False).out["kl_approx"], dtype)


@against("rlax", categorical_kl, categorical_entropy)
@given(**sizes)
def test_categorical_by_rlax(dtype, n, choices, seed):
    p, q = torch.randn(2, n, choices, generator=generator(seed), dtype=dtype)
    theirs = rlax.softmax()
    agree(
        categorical_kl(p.log_softmax(-1), q.log_softmax(-1)),
        via_rlax.call(rlax.categorical_kl_divergence, p, q),
        dtype,
    )
    agree(categorical_entropy(p.log_softmax(-1)), via_rlax.call(theirs.entropy, p), dtype)


@against("stable-baselines3", categorical_kl, categorical_entropy)
@given(**sizes)
def test_categorical_by_sb3(dtype, n, choices, seed):
    a, b = torch.randn(2, n, choices, generator=generator(seed), dtype=dtype)
    p, q = (CategoricalDistribution(choices).proba_distribution(x) for x in (a, b))
    agree(categorical_kl(a.log_softmax(-1), b.log_softmax(-1)), kl_divergence(p, q), dtype, scale=1)
    agree(categorical_entropy(a.log_softmax(-1)), p.entropy(), dtype)


@against("rlax", gaussian_kl, gaussian_entropy, gaussian_logprob)
@given(**sizes)
def test_gaussian_by_rlax(dtype, n, choices, seed):
    mean_p, mean_q, log_std_p, log_std_q, x = (
        torch.randn(5, n, choices, generator=generator(seed), dtype=dtype) / 2
    )
    std_p, std_q = log_std_p.exp(), log_std_q.exp()
    theirs = via_rlax.call(rlax.multivariate_normal_kl_divergence, mean_p, std_p, mean_q, std_q)
    agree(gaussian_kl(mean_p, log_std_p, mean_q, log_std_q), theirs, dtype)
    gaussian = rlax.gaussian_diagonal()
    agree(gaussian_entropy(log_std_p), via_rlax.call(gaussian.entropy, mean_p, std_p), dtype)
    agree(gaussian_logprob(x, mean_p, log_std_p), via_rlax.call(gaussian.logprob, x, mean_p, std_p), dtype)


@against(
    "stable-baselines3",
    gaussian_kl,
    gaussian_entropy,
    gaussian_logprob,
    note="its KL is one of each dimension",
)
@given(**sizes)
def test_gaussian_by_sb3(dtype, n, choices, seed):
    """One log σ for all states, as its policies have it."""
    g = generator(seed)
    mean_p, mean_q, x = torch.randn(3, n, choices, generator=g, dtype=dtype) / 2
    log_std_p, log_std_q = torch.randn(2, choices, generator=g, dtype=dtype) / 2
    p, q = (
        DiagGaussianDistribution(choices).proba_distribution(mean, log_std)
        for mean, log_std in ((mean_p, log_std_p), (mean_q, log_std_q))
    )
    agree(gaussian_kl(mean_p, log_std_p, mean_q, log_std_q), kl_divergence(p, q).sum(-1), dtype)
    agree(gaussian_entropy(log_std_p).expand(n), p.entropy(), dtype)
    agree(gaussian_logprob(x, mean_p, log_std_p), p.log_prob(x), dtype)


@against(
    "torchrl",
    AdaptiveLeash,
    dtypes=DOUBLE,
    note="is given the penalties −β KL of the sequences, not their KL",
)
@given(
    kls=st.lists(st.floats(-2, 20), min_size=1, max_size=5),
    target=st.floats(0.5, 10),
    horizon=st.integers(2, 1000),
    updates=st.integers(1, 3),
)
def test_adaptive_leash_by_torchrl(dtype, kls, target, horizon, updates):
    ours = AdaptiveLeash(beta=0.1, target=target, horizon=horizon)
    theirs = AdaptiveKLController(init_kl_coef=0.1, target=target, horizon=horizon)
    for _ in range(updates):
        ours.update(float(np.mean(kls)), len(kls))
        penalties = -theirs.coef * torch.tensor(kls, dtype=dtype)
        theirs.update(penalties)
        agree(ours.beta, theirs.coef, dtype)
