"""PPO-clip, PPO-KL and the critic's loss; and the constants by which libraries differ."""

from __future__ import annotations

import pytest
import rlax
import torch
import via_rlax
import via_sb3
import via_torchrl
import via_trl
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import DOUBLE, SINGLE, against, agree, bounds, generator, gradient, random_tokens, seeds, unit
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.utils import explained_variance as sb3_explained_variance
from test_advantages import trl_batch
from torchrl.objectives import ClipPPOLoss, KLPENPPOLoss

from ppolite.ops.importance import log_weights, truncated_weights
from ppolite.ops.kl import AdaptivePenalty, categorical_kl, kl_estimate
from ppolite.ops.losses import clip_loss, explained_variance, kl_penalty_loss, value_loss
from ppolite.ops.masked import whiten

tokens = {"n": st.integers(1, 9), "choices": st.integers(2, 5), "seed": seeds}
sizes = {"n": st.integers(1, 12), "seed": seeds}


def of(loss, t, **kwargs):
    """One of ours, with NaN where nobody may look."""
    return loss(
        t.unseen(t.logprobs(t.new)), t.unseen(t.logprobs(t.old)), t.unseen(t.advantages), t.mask, **kwargs
    )


# PPO-clip.


@against("torchrl", clip_loss)
@given(**tokens, low=bounds, high=st.none() | bounds)
def test_clip_by_torchrl(dtype, n, choices, seed, low, high):
    t = random_tokens(n, choices, seed, dtype)
    loss, _ = of(clip_loss, t, clip=low, clip_high=high)
    theirs = via_torchrl.policy_loss(ClipPPOLoss, t, clip_epsilon=low if high is None else (low, high))
    agree(loss, theirs.out["loss_objective"], dtype)
    agree(gradient(loss, t.new), theirs.gradient, dtype)


@against(
    "torchrl",
    clip_loss,
    note="counts every ratio beyond the bounds as clipped, ours those whose gradient is gone",
)
@given(**tokens, clip=bounds)
def test_diagnostics_by_torchrl(dtype, n, choices, seed, clip):
    t = random_tokens(n, choices, seed, dtype)
    _, ours = of(clip_loss, t, clip=clip)
    theirs = via_torchrl.policy_loss(ClipPPOLoss, t, masked=False, clip_epsilon=clip).out
    agree(ours["ratio_mean"], theirs["mean_ratio"], dtype)
    agree(ours["ratio_max"], theirs["max_ratio"], dtype)
    assert ours["clip_fraction"] <= theirs["clip_fraction"] + 1e-6
    # Both signs of every advantage: then each ratio beyond the bounds binds once.
    for_good, for_bad = (
        of(clip_loss, t._replace(advantages=s * t.advantages.abs()), clip=clip)[1]["clip_fraction"]
        for s in (1, -1)
    )
    agree(for_good + for_bad, theirs["clip_fraction"], dtype)


@against("torchrl", clip_loss, kl_penalty_loss, log_weights)
@given(**tokens, clip=bounds, beta=bounds)
def test_decoupled_losses_by_torchrl(dtype, n, choices, seed, clip, beta):
    """`delay_actor`: data of μ, a ratio against π_old, weights π_old/μ. Their PPO-KL has the exact KL."""
    t = random_tokens(n, choices, seed, dtype)
    w = log_weights(t.unseen(t.logprobs(t.old)), t.unseen(t.logprobs(t.behaviour)), t.mask).exp()
    loss, _ = of(clip_loss, t, clip=clip, behaviour_weights_BR=t.unseen(w))
    theirs = via_torchrl.policy_loss(ClipPPOLoss, t, prox=t.old, clip_epsilon=clip, delay_actor=True)
    agree(loss, theirs.out["loss_objective"], dtype, scale=w.max().item())
    agree(gradient(loss, t.new), theirs.gradient, dtype, scale=w.max().item())

    kl = categorical_kl(t.old.log_softmax(-1), t.new.log_softmax(-1))
    loss, _ = of(kl_penalty_loss, t, beta=beta, kl_BR=t.unseen(kl), behaviour_weights_BR=t.unseen(w))
    theirs = via_torchrl.policy_loss(
        KLPENPPOLoss, t, prox=t.old, beta=beta, delay_actor=True, dtarg=kl.mean().item()
    )
    agree(loss, theirs.out["loss_objective"], dtype, scale=w.max().item())
    agree(gradient(loss, t.new), theirs.gradient, dtype, scale=w.max().item())


@against("rlax", clip_loss)
@given(**tokens, clip=unit.filter(lambda x: x > 0))
def test_clip_by_rlax(dtype, n, choices, seed, clip):
    t = random_tokens(n, choices, seed, dtype)
    ratio = (t.logprobs(t.new) - t.logprobs(t.old)).exp().detach()
    loss, _ = of(clip_loss, t, clip=clip)
    theirs = via_rlax.call(rlax.clipped_surrogate_pg_loss, ratio[t.mask], t.advantages[t.mask], clip)
    agree(loss, theirs, dtype)


@against(
    "stable-baselines3",
    clip_loss,
    kl_estimate,
    dtypes=SINGLE,
    note="counts every ratio beyond the bounds as clipped; its approx_kl is k3",
)
@given(**sizes, clip=st.floats(0.05, 0.9))
def test_clip_by_sb3(dtype, n, seed, clip):
    new, old, advantages, values = torch.randn(4, n, generator=generator(seed), dtype=dtype)
    mask = torch.ones(n, dtype=torch.bool)
    theirs = via_sb3.train(
        PPO, logprobs=new, values=values, old_logprobs=old, old_values=values, advantages=advantages, returns=values,
        clip=clip,
    )  # fmt: skip
    new.requires_grad_()
    loss, ours = clip_loss(new, old, advantages, mask, clip=clip)
    agree(loss, theirs.log["train/policy_gradient_loss"], dtype)
    agree(gradient(loss, new), theirs.logprob_grad, dtype)
    agree(ours["approx_kl"], theirs.log["train/approx_kl"], dtype)
    assert ours["clip_fraction"] <= theirs.log["train/clip_fraction"] + 1e-6


@against(
    "stable-baselines3",
    whiten,
    dtypes=SINGLE,
    note="divides by the standard deviation with ddof 1, and adds 1e-8 to it, not to the variance",
)
@given(n=st.integers(2, 12), seed=seeds)
def test_normalised_advantages_by_sb3(dtype, n, seed):
    new, old, advantages, values = torch.randn(4, n, generator=generator(seed), dtype=dtype)
    mask = torch.ones(n, dtype=torch.bool)
    advantages *= 10
    white = whiten(advantages, mask, shift_mean=True) * ((n - 1) / n) ** 0.5
    theirs = via_sb3.train(
        PPO, logprobs=new, values=values, old_logprobs=old, old_values=values, advantages=advantages, returns=values,
        normalize=True,
    )  # fmt: skip
    agree(
        clip_loss(new, old, white, mask, clip=0.2)[0],
        theirs.log["train/policy_gradient_loss"],
        dtype,
        scale=4,
    )


@against("trl", clip_loss, value_loss, kl_estimate, note="its approx_kl is k2, a mean over padding too")
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 7),
    seed=seeds,
    clip=st.floats(0.05, 0.9),
    wide=st.floats(0.05, 2),
)
def test_update_by_trl(dtype, rows, length, seed, clip, wide):
    seen, lengths = trl_batch(rows, seed, dtype, length, cliprange=clip, cliprange_value=wide)
    assume(lengths.sum() > 1)  # of a single token its whitening divides 0 by 0
    order = seen.micro_batch_inds
    mask, longer = ~seen.padding_mask[order], ~seen.padding_mask_p1[order]
    hide = lambda x, m: torch.where(m, x, torch.nan)  # noqa: E731
    loss, ours = clip_loss(
        *(hide(x, mask) for x in (seen.new_logprobs, seen.mb_logprobs, seen.mb_advantage)), mask, clip=clip
    )
    agree(loss, seen.pg_loss, dtype)
    single = torch.float32  # of what it logs
    agree(ours["clip_fraction"].float(), seen.pg_clipfrac_stats[0, 0, 0], single)
    k2 = kl_estimate(seen.mb_logprobs, seen.new_logprobs, "k2")
    agree(k2.mean().float(), seen.approxkl_stats[0, 0, 0], single)

    loss, ours = value_loss(
        *(hide(x, longer) for x in (seen.vpred, seen.mb_values, seen.mb_return)), longer, clip=wide
    )
    agree(loss, seen.vf_loss, dtype)
    agree(ours["clip_fraction"].float(), seen.vf_clipfrac.float(), single)


@against("trl", clip_loss, note="GRPO's `delta` is the dual clip")
@given(
    rows=st.integers(1, 3),
    columns=st.integers(2, 6),
    seed=seeds,
    low=st.floats(0.05, 0.9),
    high=st.floats(0.05, 0.9),
    dual=st.none() | st.floats(2, 4),
    stale=st.booleans(),
)
def test_every_clip_by_trl(dtype, rows, columns, seed, low, high, dual, stale):
    """Asymmetric bounds, the dual clip, and truncated weights π_old/μ."""
    g = generator(seed)
    new, old, behaviour, advantages = torch.randn(4, rows, columns, generator=g, dtype=dtype)
    mask = torch.rand(rows, columns, generator=g) < 0.7
    mask[0, 0] = True
    w = truncated_weights(old - behaviour, 2.0) if stale else None
    new.requires_grad_()
    hide = lambda x: torch.where(mask, x, torch.nan)  # noqa: E731
    loss, ours = clip_loss(
        *(hide(x) for x in (new, old, advantages)), mask, clip=low, clip_high=high, dual_clip=dual,
        behaviour_weights_BR=None if w is None else hide(w),
    )  # fmt: skip
    theirs, log = via_trl.grpo(new, old, advantages, mask, low=low, high=high, delta=dual, weights=w)
    agree(loss, theirs, dtype)
    agree(gradient(loss, new), gradient(theirs, new), dtype)
    if dual is None:  # what the dual clip binds, it does not count
        agree(ours["clip_fraction"].float(), log["clip_ratio/region_mean"], torch.float32)


# PPO-KL.


@against("torchrl", kl_penalty_loss, categorical_kl)
@given(**tokens, beta=bounds.map(lambda x: 4 * x))
def test_kl_penalty_by_torchrl(dtype, n, choices, seed, beta):
    t = random_tokens(n, choices, seed, dtype)
    kl = categorical_kl(t.old.log_softmax(-1), t.new.log_softmax(-1))
    loss, _ = of(kl_penalty_loss, t, beta=beta, kl_BR=t.unseen(kl))
    theirs = via_torchrl.policy_loss(KLPENPPOLoss, t, beta=beta, dtarg=kl.mean().item())  # where it keeps β
    agree(loss, theirs.out["loss_objective"], dtype, scale=beta)
    agree(gradient(loss, t.new), theirs.gradient, dtype, scale=beta)
    agree(kl, theirs.out["kl"][:, 0], dtype)


@against(
    "torchrl", kl_penalty_loss, note="where it adapts β, the loss has the old β and its gradient the new one"
)
@given(**tokens, beta=bounds, high=st.booleans())
def test_torchrl_adapts_beta_between_the_loss_and_its_gradient(dtype, n, choices, seed, beta, high):
    """It changes β in place after the forward pass has used it, and before the backward pass does."""
    t = random_tokens(n, choices, seed, dtype)
    kl = categorical_kl(t.old.log_softmax(-1), t.new.log_softmax(-1))
    target = kl.mean().item() * (0.5 if high else 2)
    theirs = via_torchrl.policy_loss(KLPENPPOLoss, t, beta=beta, dtarg=target)
    adapted = theirs.module.beta.item()
    assert adapted == beta * (2 if high else 0.5)
    loss, _ = of(kl_penalty_loss, t, beta=beta, kl_BR=t.unseen(kl))
    agree(loss, theirs.out["loss_objective"], dtype)
    loss, _ = of(kl_penalty_loss, t, beta=adapted, kl_BR=t.unseen(kl))
    agree(gradient(loss, t.new), theirs.gradient, dtype)


@against("rlax", kl_penalty_loss, note="put together from its surrogate and its KL")
@given(**tokens, beta=st.floats(0, 4))
def test_kl_penalty_by_rlax(dtype, n, choices, seed, beta):
    t = random_tokens(n, choices, seed, dtype)
    kl = categorical_kl(t.old.log_softmax(-1), t.new.log_softmax(-1))
    loss, _ = of(kl_penalty_loss, t, beta=beta, kl_BR=t.unseen(kl))
    ratio = (t.logprobs(t.new) - t.logprobs(t.old)).exp().detach()
    surrogate = via_rlax.call(rlax.clipped_surrogate_pg_loss, ratio[t.mask], t.advantages[t.mask], 1e30)
    penalty = via_rlax.call(rlax.categorical_kl_divergence, t.old[t.mask], t.new[t.mask]).mean()
    agree(loss, surrogate + beta * penalty, dtype, scale=beta)


@against(
    "torchrl",
    AdaptivePenalty,
    dtypes=DOUBLE,
    note="adapts at every forward pass, of each minibatch and epoch",
)
@given(**tokens, target=st.floats(-12, 2).map(lambda x: 2**x), passes=st.integers(1, 3))
def test_adaptive_penalty_by_torchrl(dtype, n, choices, seed, target, passes):
    """One update of ours, when the update is done; one of theirs for each look at the loss."""
    t = random_tokens(n, choices, seed, dtype)
    result = via_torchrl.policy_loss(KLPENPPOLoss, t, masked=False, beta=0.5, dtarg=target)
    mean = result.out["kl"].mean().item()
    ours = AdaptivePenalty(beta=0.5, target=target)
    ours.update(mean)
    assert ours.beta == result.module.beta.item()
    for _ in range(passes):  # of the same minibatch: their β moves on, although no update took place
        ours.update(mean)
        result.module(result.data)
        assert ours.beta == result.module.beta.item()


# The critic.


@against("torchrl", value_loss, note="no ½; counts every value that moved too far as clipped")
@given(**sizes, clip=st.none() | bounds)
def test_value_loss_by_torchrl(dtype, n, seed, clip):
    values, old, returns = torch.randn(3, n, generator=generator(seed), dtype=dtype)
    values.requires_grad_()
    loss, ours = value_loss(values, old, returns, torch.ones(n, dtype=torch.bool), clip=clip)
    theirs, grad = via_torchrl.critic_loss(ClipPPOLoss, values, old, returns, clip=clip)
    agree(2 * loss, theirs["loss_critic"], dtype)
    agree(2 * gradient(loss, values), grad, dtype)
    if clip is not None:
        assert ours["clip_fraction"] <= theirs["value_clip_fraction"] + 1e-6


@against(
    "stable-baselines3", value_loss, dtypes=SINGLE, note="no ½; the clipped error alone, not the larger one"
)
@given(**sizes, clip=st.none() | st.floats(0.05, 2))
def test_value_loss_by_sb3(dtype, n, seed, clip):
    values, old, returns = torch.randn(3, n, generator=generator(seed), dtype=dtype)
    mask = torch.ones(n, dtype=torch.bool)
    zero = torch.zeros(n)
    theirs = via_sb3.train(
        PPO, logprobs=zero, values=values, old_logprobs=zero, old_values=old, advantages=zero, returns=returns,
        clip_value=clip,
    )  # fmt: skip
    values.requires_grad_()
    loss, _ = value_loss(values, old, returns, mask, clip=clip)
    if clip is None:
        agree(2 * loss, theirs.log["train/value_loss"], dtype)
        agree(2 * gradient(loss, values), theirs.value_grad, dtype)
        return
    assert 2 * loss.item() >= theirs.log["train/value_loss"] - 1e-6
    near = torch.maximum(torch.minimum(values, old + clip), old - clip)
    plain, _ = value_loss(near.detach(), old, returns, mask, clip=None)
    agree(2 * plain, theirs.log["train/value_loss"], dtype)


@against("rlax", value_loss)
@given(**sizes)
def test_value_loss_by_rlax(dtype, n, seed):
    values, returns = torch.randn(2, n, generator=generator(seed), dtype=dtype)
    loss, _ = value_loss(values, values, returns, torch.ones(n, dtype=torch.bool), clip=None)
    agree(loss, via_rlax.call(rlax.l2_loss, values, returns).mean(), dtype)


@against("stable-baselines3", explained_variance)
@given(n=st.integers(2, 12), seed=seeds)
def test_explained_variance_by_sb3(dtype, n, seed):
    values, returns = torch.randn(2, n, generator=generator(seed), dtype=dtype)
    ours = explained_variance(values, returns, torch.ones(n, dtype=torch.bool))
    agree(ours, sb3_explained_variance(values.numpy(), returns.numpy()), dtype)


@against("torchrl", explained_variance, note="adds the dtype's rounding to the variance")
@given(n=st.integers(2, 12), seed=seeds)
def test_explained_variance_by_torchrl(dtype, n, seed):
    values, old, returns = torch.randn(3, n, generator=generator(seed), dtype=dtype)
    ours = explained_variance(values, returns, torch.ones(n, dtype=torch.bool))
    theirs, _ = via_torchrl.critic_loss(ClipPPOLoss, values.requires_grad_(), old, returns, clip=None)
    total = returns.var(correction=0).item()
    with_eps = 1 - (1 - ours.item()) * total / (total + torch.finfo(dtype).eps)
    agree(with_eps, theirs["explained_variance"][0], dtype, scale=1)  # 1 less a share


@pytest.mark.parametrize("algorithm", [A2C, PPO])
def test_sb3_logs_the_explained_variance_of_the_critic_before_the_update(algorithm):
    """As the docstring of ours recommends."""
    values, old, returns = torch.randn(3, 9, generator=generator(3))
    zero = torch.zeros(9)
    theirs = via_sb3.train(
        algorithm,
        logprobs=zero,
        values=values,
        old_logprobs=zero,
        old_values=old,
        advantages=zero,
        returns=returns,
    )
    ours = explained_variance(old, returns, torch.ones(9, dtype=torch.bool))
    agree(ours, theirs.log["train/explained_variance"], torch.float32)
