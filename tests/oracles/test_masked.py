"""Masked means, variances and whitening of RLHF."""

from __future__ import annotations

import torch
import via_torchrl
from hypothesis import given
from hypothesis import strategies as st
from oracle import SINGLE, against, agree, generator, random_tokens, seeds
from test_advantages import trl_batch
from torchrl.objectives import ClipPPOLoss
from trl.experimental.ppo import ppo_trainer

from ppolite.ops.losses import clip_loss
from ppolite.ops.masked import masked_mean, masked_sum, masked_var, whiten


def batch(rows, columns, seed, dtype):
    g = generator(seed)
    x = 3 * torch.randn(rows, columns, generator=g, dtype=dtype) + 1
    mask = torch.rand(rows, columns, generator=g) < 0.7
    mask.flatten()[:2] = True
    return x, mask, torch.where(mask, x, torch.nan)


sizes = {"rows": st.integers(1, 5), "columns": st.integers(2, 6), "seed": seeds}


@against("trl", masked_mean, masked_sum, masked_var)
@given(**sizes)
def test_statistics_by_trl(dtype, rows, columns, seed):
    x, mask, hidden = batch(rows, columns, seed, dtype)
    n = int(mask.sum())
    agree(masked_mean(hidden, mask), ppo_trainer.masked_mean(x, mask), dtype)
    agree(masked_sum(hidden, mask), n * ppo_trainer.masked_mean(x, mask), dtype)
    agree(masked_var(hidden, mask), ppo_trainer.masked_var(x, mask, unbiased=False), dtype)


@against(
    "trl",
    masked_var,
    dtypes=SINGLE,
    note="masked_var has ddof 1 unless unbiased=False, its n/(n−1) rounded to float32; so in masked_whiten",
)
@given(**sizes)
def test_variance_by_trl(dtype, rows, columns, seed):
    x, mask, hidden = batch(rows, columns, seed, dtype)
    n = int(mask.sum())
    agree(masked_var(hidden, mask) * n / (n - 1), ppo_trainer.masked_var(x, mask), dtype)


@against("trl", whiten, dtypes=SINGLE, note="ddof 1, so that it is smaller by √((n−1)/n)")
@given(**sizes, shift_mean=st.booleans())
def test_whitening_by_trl(dtype, rows, columns, seed, shift_mean):
    """Our variance is n/(n−1) of the smaller; what is added to it, 1e-8, both have."""
    x, mask, hidden = batch(rows, columns, seed, dtype)
    n = int(mask.sum())
    eps = 1e-8 * (n - 1) / n
    mean = masked_mean(hidden, mask)
    centred = whiten(hidden, mask, shift_mean=True, eps=eps) * ((n - 1) / n) ** 0.5
    ours = centred if shift_mean else centred + mean
    agree(ours[mask], ppo_trainer.masked_whiten(x, mask, shift_mean)[mask], dtype, scale=10)
    with_mean = whiten(hidden, mask, shift_mean=False, eps=eps) - whiten(
        hidden, mask, shift_mean=True, eps=eps
    )
    agree(with_mean[mask], mean.expand(n), dtype, scale=10)


@against("trl", whiten, dtypes=SINGLE, note="whitens rewards with their mean, advantages without")
@given(rows=st.integers(2, 4), length=st.integers(2, 7), seed=seeds)
def test_what_trl_whitens(dtype, rows, length, seed):
    seen, _ = trl_batch(rows, seed, dtype, length, whiten_rewards=True)
    rewards, advantages = seen.unwhitened
    for raw, white, mask, shift_mean in (
        (rewards, seen.rewards, ~seen.padding_mask_p1, False),
        (advantages, seen.advantages, ~seen.padding_mask, True),
    ):
        n = int(mask.sum())
        ours = whiten(raw, mask, shift_mean=True, eps=1e-8 * (n - 1) / n) * ((n - 1) / n) ** 0.5
        ours = ours if shift_mean else torch.where(mask, ours + masked_mean(raw, mask), 0)
        agree(ours, white, dtype, scale=10)


@against("torchrl", whiten, masked_mean, masked_var, note="ddof 0 with a mask, ddof 1 without; nothing added")
@given(n=st.integers(3, 9), seed=seeds, masked=st.booleans())
def test_normalised_advantages_by_torchrl(dtype, n, seed, masked):
    t = random_tokens(n, 3, seed, dtype)
    t.mask[:2] = True
    t = t._replace(advantages=10 * t.advantages)
    if not masked:
        t = t._replace(mask=torch.ones(n, dtype=torch.bool))
    white = whiten(t.unseen(t.advantages), t.mask, shift_mean=True, eps=0.0)
    if not masked:
        white = white * ((n - 1) / n) ** 0.5
    loss, _ = clip_loss(t.logprobs(t.new), t.logprobs(t.old), white, t.mask, clip=0.25)
    theirs = via_torchrl.policy_loss(
        ClipPPOLoss, t, masked=masked, clip_epsilon=0.25, normalize_advantage=True
    )
    agree(loss, theirs.out["loss_objective"], dtype, scale=10)
