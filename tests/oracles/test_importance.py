"""Weights π_θ/μ, as other libraries multiply, truncate and count them."""

from __future__ import annotations

import rlax
import torch
import via_rlax
import via_torchrl
import via_trl
from hypothesis import given
from hypothesis import strategies as st
from oracle import BOTH, against, agree, bounds, generator, gradient, random_steps, random_tokens, seeds, unit
from torchrl.objectives import ClipPPOLoss, PPOLoss

from ppolite.ops.advantages import Steps, vtrace
from ppolite.ops.importance import effective_sample_size, log_weights, truncated_weights
from ppolite.ops.recurrence import ahead

# rlax is compiled for each shape.
tokens = {"n": st.sampled_from([1, 4, 9]), "choices": st.sampled_from([2, 5]), "seed": seeds}


@against("rlax", log_weights)
@given(**tokens)
def test_step_weights_by_rlax(dtype, n, choices, seed):
    t = random_tokens(n, choices, seed, dtype)
    new, behaviour = t.logprobs(t.new.detach()), t.logprobs(t.behaviour)
    ours = log_weights(t.unseen(new), t.unseen(behaviour), t.mask).exp()
    ratios = rlax.categorical_importance_sampling_ratios
    theirs = via_rlax.call(ratios, t.new, t.behaviour, t.actions)
    agree(ours[t.mask], theirs[t.mask.numpy()], dtype)


@against("rlax", log_weights)
@given(columns=st.integers(1, 8), seed=seeds, gamma=unit)
def test_weights_so_far_by_rlax(dtype, columns, seed, gamma):
    """Per-decision importance sampling without a critic, Σ_t γ^t w_t r_t: to rlax a λ-return with λ_t = ρ_t."""
    new, behaviour, rewards = torch.randn(3, 1, columns, generator=generator(seed), dtype=dtype) / 2
    mask = torch.ones(1, columns, dtype=torch.bool)
    w = log_weights(new, behaviour, mask, kind="per_decision").exp()
    ours = (gamma ** torch.arange(columns, dtype=dtype) * w * rewards).sum()
    ratios = (new - behaviour).exp()
    discounts, zeros = torch.full((columns,), gamma, dtype=dtype), torch.zeros(columns, dtype=dtype)
    theirs = via_rlax.call(rlax.lambda_returns, rewards[0], discounts, zeros, ahead(ratios)[0])
    agree(ours, ratios[0, 0] * theirs[0], dtype, scale=(w * rewards).abs().max().item())


@against("torchrl", log_weights)
@given(columns=st.integers(1, 8), seed=seeds)
def test_weights_of_a_trajectory_by_torchrl(dtype, columns, seed):
    """V-trace without truncation, without a critic, of a reward of 1 at the end: the weight of the whole row."""
    new, behaviour = torch.randn(2, 1, columns, generator=generator(seed), dtype=dtype) / 2
    mask, zero = torch.ones(1, columns, dtype=torch.bool), torch.zeros(1, columns, dtype=dtype)
    last = torch.arange(columns)[None] == columns - 1
    ours = log_weights(new, behaviour, mask, kind="trajectory").exp()
    infinite = torch.tensor(torch.inf, dtype=dtype)
    seen = via_torchrl.Plain(last.to(dtype), zero, zero, last, last)
    one = torch.tensor(1.0, dtype=dtype)
    targets, _ = via_torchrl.vtrace(seen, new - behaviour, one, infinite, infinite)
    agree(ours[0], targets[0, :1].expand(columns), dtype)


@against(
    "trl", log_weights, note="its weight of a sequence is the root of ours, of as many as there are tokens"
)
@given(rows=st.integers(1, 3), columns=st.integers(1, 6), seed=seeds)
def test_weights_of_a_trajectory_by_trl(dtype, rows, columns, seed):
    """`importance_sampling_level="sequence"` (GSPO), read off the gradient of the CISPO loss."""
    g = generator(seed)
    new, old = torch.randn(2, rows, columns, generator=g, dtype=dtype)
    mask = torch.rand(rows, columns, generator=g) < 0.7
    mask[:, 0] = True
    logprobs = new.clone().requires_grad_()
    loss, _ = via_trl.grpo(
        logprobs, old, torch.ones(rows, dtype=dtype), mask, loss_type="cispo", high=1e9, level="sequence"
    )
    theirs = -gradient(loss, logprobs) * mask.sum()
    log_w = log_weights(torch.where(mask, new, torch.nan), old, mask, kind="trajectory")
    agree((log_w / mask.sum(1, keepdim=True)).exp()[mask], theirs[mask], dtype)


@against("trl", truncated_weights)
@given(n=st.integers(1, 9), seed=seeds, cap=st.floats(0.25, 4))
def test_truncation_by_trl(dtype, n, seed, cap):
    """The weight in front of log π of the CISPO loss, read off its gradient."""
    new, old = torch.randn(2, 1, n, generator=generator(seed), dtype=dtype)
    mask, logprobs = torch.ones(1, n, dtype=torch.bool), new.clone().requires_grad_()
    loss, _ = via_trl.grpo(logprobs, old, torch.ones(1, dtype=dtype), mask, loss_type="cispo", high=cap)
    agree(truncated_weights(new - old, cap), -gradient(loss, logprobs) * n, dtype)


@against("torchrl", truncated_weights)
@given(n=st.integers(1, 9), seed=seeds, cap=bounds.map(lambda x: 4 * x))
def test_truncation_by_torchrl(dtype, n, seed, cap):
    """`max_importance_ratio`, read off the surrogate's value."""
    t = random_tokens(n, 3, seed, dtype)._replace(mask=torch.ones(n, dtype=torch.bool))
    t = t._replace(advantages=torch.ones(n, dtype=dtype))
    theirs = via_torchrl.policy_loss(PPOLoss, t, max_importance_ratio=cap, reduction="none")
    log_w = (t.logprobs(t.new) - t.logprobs(t.old)).detach()
    agree(truncated_weights(log_w, cap), -theirs.out["loss_objective"].flatten(), dtype)


@against("rlax", truncated_weights)
@given(n=st.integers(1, 8), seed=seeds, cap=st.floats(1, 4))
def test_truncation_by_rlax(dtype, n, seed, cap):
    """ρ of V-trace on one-step episodes with a reward of 1."""
    log_w = torch.randn(1, n, generator=generator(seed), dtype=dtype)
    one, zero, yes = torch.ones_like(log_w), torch.zeros_like(log_w), torch.ones(1, n, dtype=torch.bool)
    targets, _ = via_rlax.vtrace(Steps(one, zero, zero, yes, yes, yes), log_w, 1.0, 1.0, cap)
    agree(truncated_weights(log_w, cap), targets, dtype)


@against("torchrl", effective_sample_size, note="divided by the number of samples")
@given(**tokens)
def test_effective_sample_size_by_torchrl(dtype, n, choices, seed):
    t = random_tokens(n, choices, seed, dtype)
    theirs = via_torchrl.policy_loss(ClipPPOLoss, t, masked=False).out["ESS"]
    log_w = log_weights(t.logprobs(t.new.detach()), t.logprobs(t.old), t.mask)[t.mask]
    agree(effective_sample_size(log_w) / len(log_w), theirs, dtype)


@against("rlax", log_weights, vtrace, dtypes=BOTH)
@given(rows=st.integers(1, 3), columns=st.integers(1, 6), seed=seeds)
def test_vtrace_on_the_weights_of_log_weights(dtype, rows, columns, seed):
    """What one gives is what the other takes."""
    steps, log_w = random_steps(rows, columns, seed, dtype)
    weights = log_weights(log_w - 1, torch.full_like(log_w, -1), steps.mask_BT)
    for a, b in zip(
        vtrace(steps, weights, gamma=0.9), via_rlax.vtrace(steps, log_w, 0.9, 1.0, 1.0), strict=True
    ):
        agree(a[steps.mask_BT], b[steps.mask_BT], dtype)
