"""TD(0), n-step, Monte Carlo, TD(λ), GAE and V-trace, with both kinds of ends and gaps in the mask."""

from __future__ import annotations

import torch
import via_rlax
import via_sb3
import via_torchrl
import via_trl
from hypothesis import given
from hypothesis import strategies as st
from oracle import BOTH, SINGLE, against, agree, generator, plain, random_steps, seeds, shapes, unit
from torch import Tensor

from ppolite.ops.advantages import Steps, gae, monte_carlo, td, td_lambda, vtrace
from ppolite.ops.kl import kl_estimate
from ppolite.ops.masked import masked_zero


def same(ours: Tensor, theirs: Tensor, steps: Steps, dtype: torch.dtype) -> None:
    """Where the mask is True; ours is 0 elsewhere."""
    agree(ours[steps.mask_BT], theirs[steps.mask_BT], dtype)
    assert not ours[~steps.mask_BT].any()


@against("torchrl", td, monte_carlo, td_lambda, gae)
@given(**shapes, gamma=unit, lam=unit)
def test_returns_by_torchrl(dtype, rows, columns, seed, gamma, lam):
    steps, _ = random_steps(rows, columns, seed, dtype)
    seen, g, m = plain(steps), torch.tensor(gamma, dtype=dtype), torch.tensor(lam, dtype=dtype)
    same(td(steps, gamma=gamma), via_torchrl.td(seen, g), steps, dtype)
    same(monte_carlo(steps, gamma=gamma), via_torchrl.monte_carlo(seen, g), steps, dtype)
    same(td_lambda(steps, gamma=gamma, lam=lam), via_torchrl.td_lambda(seen, g, m), steps, dtype)
    for ours, theirs in zip(gae(steps, gamma=gamma, lam=lam), via_torchrl.gae(seen, g, m), strict=True):
        same(ours, theirs, steps, dtype)


@against("torchrl", vtrace)
@given(**shapes, gamma=unit, rho_max=st.floats(0.25, 4), share=st.floats(0.125, 1))
def test_vtrace_by_torchrl(dtype, rows, columns, seed, gamma, rho_max, share):
    """It knows no λ: its is 1."""
    steps, log_w = random_steps(rows, columns, seed, dtype)
    c_max = rho_max * share
    ours = vtrace(steps, log_w, gamma=gamma, rho_max=rho_max, c_max=c_max)
    settings = (torch.tensor(x, dtype=dtype) for x in (gamma, rho_max, c_max))
    for a, b in zip(ours, via_torchrl.vtrace(plain(steps), log_w, *settings), strict=True):
        same(a, b, steps, dtype)


@against("rlax", td, monte_carlo, td_lambda, gae)
@given(**shapes, gamma=unit, lam=unit, n=st.sampled_from([1, 2, 3, 9]))
def test_returns_by_rlax(dtype, rows, columns, seed, gamma, lam, n):
    steps, _ = random_steps(rows, columns, seed, dtype)
    same(td(steps, gamma=gamma, n=n), via_rlax.td(steps, gamma, n), steps, dtype)
    same(monte_carlo(steps, gamma=gamma), via_rlax.monte_carlo(steps, gamma), steps, dtype)
    same(td_lambda(steps, gamma=gamma, lam=lam), via_rlax.td_lambda(steps, gamma, lam), steps, dtype)
    same(gae(steps, gamma=gamma, lam=lam)[0], via_rlax.gae(steps, gamma, lam), steps, dtype)


@against("rlax", vtrace)
@given(**shapes, gamma=unit, lam=unit, rho_max=st.floats(1, 4))
def test_vtrace_by_rlax(dtype, rows, columns, seed, gamma, lam, rho_max):
    """Its c̄ is 1."""
    steps, log_w = random_steps(rows, columns, seed, dtype)
    ours = vtrace(steps, log_w, gamma=gamma, lam=lam, rho_max=rho_max, c_max=1.0)
    for a, b in zip(ours, via_rlax.vtrace(steps, log_w, gamma, lam, rho_max), strict=True):
        same(a, b, steps, dtype)


@against(
    "stable-baselines3",
    gae,
    dtypes=SINGLE,
    note="a truncation is a termination with γ V(s′) added to the reward",
)
@given(**shapes, gamma=unit, lam=unit)
def test_gae_by_sb3(dtype, rows, columns, seed, gamma, lam):
    steps, _ = random_steps(rows, columns, seed, dtype, gaps=False)
    buffer = via_sb3.collect(steps, gamma, lam)
    advantages, returns = gae(steps, gamma=gamma, lam=lam)
    agree(advantages, buffer.advantages.T, dtype)
    agree(returns, buffer.returns.T, dtype)
    truncated = steps.ended_BT & ~steps.terminated_BT
    added = torch.where(truncated, gamma * steps.next_values_BT, 0)
    agree(steps.rewards_BT + added, buffer.rewards.T, dtype)


def trl_batch(rows, seed, dtype, length, **settings):
    """TRL's locals, and the lengths of responses with their END; 0 behind END, as nobody should read it."""
    g = generator(seed)
    lengths = torch.randint(1, length + 1, (rows,), generator=g)
    responses = torch.randint(2, 5, (rows, length), generator=g)
    ended = torch.rand(rows, generator=g) < 0.7
    lengths[~ended] = length
    responses[ended, lengths[ended] - 1] = via_trl.END
    logits, ref_logits, new_logits = torch.randn(3, rows, length, 5, generator=g, dtype=dtype)
    values, new_values = torch.randn(2, rows, length, generator=g, dtype=dtype)
    seen = via_trl.ppo(
        responses=responses,
        logits=logits,
        ref_logits=ref_logits,
        new_logits=new_logits,
        values=values,
        new_values=new_values,
        scores=torch.randn(rows, generator=g, dtype=dtype),
        **{"kl_coef": 0.1, "whiten_rewards": False, "kl_estimator": "k1", "vf_coef": 0.1, "cliprange": 0.2,
           "cliprange_value": 0.2, "gamma": 1.0, "lam": 0.95} | settings,
    )  # fmt: skip
    return seen, lengths


@against(
    "trl", Steps, gae, note="the score lands one place behind END, where there is one, and V is asked there"
)
@given(rows=st.integers(1, 4), length=st.integers(1, 7), seed=seeds, gamma=unit, lam=unit)
def test_gae_by_trl(dtype, rows, length, seed, gamma, lam):
    """Its rewards and values on responses that are one place longer than the text."""
    seen, lengths = trl_batch(rows, seed, dtype, length, gamma=gamma, lam=lam)
    longer = (lengths + 1).clamp(max=length)
    mask = torch.arange(length) < longer[:, None]
    assert torch.equal(mask, ~seen.padding_mask_p1)
    score_at = torch.zeros(rows, length, dtype=dtype)
    score_at[torch.arange(rows), longer - 1] = seen.scores
    kl = kl_estimate(seen.logprobs, seen.ref_logprobs, "k1")  # 0 behind END: both log-probs are 1 there
    agree(score_at - 0.1 * kl, seen.rewards, dtype)

    steps = Steps.of_responses(seen.rewards, seen.values, mask)
    advantages, returns = gae(steps, gamma=gamma, lam=lam)
    agree(advantages, masked_zero(seen.unwhitened[-1], mask), dtype)
    agree(returns, masked_zero(seen.returns, mask), dtype)


@against("trl", gae, note="at γ = λ = 1 its place of the score makes no difference")
@given(rows=st.integers(1, 4), length=st.integers(1, 7), seed=seeds)
def test_where_the_score_lands_does_not_matter_at_gamma_and_lambda_1(dtype, rows, length, seed):
    """Ours lands on END itself."""
    seen, lengths = trl_batch(rows, seed, dtype, length, gamma=1.0, lam=1.0)
    mask = torch.arange(length) < lengths[:, None]
    kl = kl_estimate(seen.logprobs, seen.ref_logprobs, "k1")
    rewards = masked_zero(-0.1 * kl, mask)
    rewards[torch.arange(rows), lengths - 1] += seen.scores
    advantages, _ = gae(Steps.of_responses(rewards, seen.values, mask), gamma=1.0, lam=1.0)
    agree(advantages, masked_zero(seen.unwhitened[-1], mask), dtype)


def test_where_the_score_lands_matters_below():
    """One token, END, and a place behind it: TRL discounts the score once and asks V there."""
    seen, lengths = trl_batch(1, 0, torch.float64, 3, gamma=0.9, lam=0.5, kl_coef=0.0)
    for seed in range(99):
        seen, lengths = trl_batch(1, seed, torch.float64, 3, gamma=0.9, lam=0.5, kl_coef=0.0)
        if lengths.item() == 1:
            break
    theirs = seen.unwhitened[-1][0, 0].item()
    score, (value, behind, _) = seen.scores.item(), seen.values[0].tolist()
    mask = torch.tensor([[True]])
    ours, _ = gae(Steps.of_responses(seen.scores[:, None], seen.values[:, :1], mask), gamma=0.9, lam=0.5)
    assert abs(ours.item() - (score - value)) < 1e-12
    assert abs(theirs - (0.9 * behind - value + 0.45 * (score - behind))) < 1e-12
    assert abs(ours.item() - theirs) > 0.01


@against("torchrl", gae, dtypes=BOTH[1:], note="a γ that is a Python float is rounded to float32")
def test_torchrl_rounds_gamma(dtype):
    steps, _ = random_steps(2, 8, 1, dtype)
    seen, lam = plain(steps), torch.tensor(1.0, dtype=dtype)
    ours, _ = gae(steps, gamma=0.9, lam=1.0)
    exact, _ = via_torchrl.gae(seen, torch.tensor(0.9, dtype=dtype), lam)
    rounded, _ = via_torchrl.gae(seen, 0.9, 1.0)
    same(ours, exact, steps, dtype)
    apart = (rounded - exact)[steps.mask_BT].abs().max().item()
    assert 1e-9 < apart < 1e-6
