"""What a reward model learns from, and how it is judged."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import rlax
import scipy.stats
import torch
import via_rlax
import via_trl
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import against, agree, generator, gradient, seeds
from tensorflow_probability.substrates import jax as tfp
from torchrl.objectives.utils import distance_loss

from ppolite.ops.preference import bradley_terry_loss, pair_accuracy, plackett_luce_loss, regression_loss

sizes = {"n": st.integers(1, 9), "seed": seeds}


@against("trl", bradley_terry_loss)
@given(**sizes, with_margin=st.booleans())
def test_bradley_terry_by_trl(dtype, n, seed, with_margin):
    chosen, rejected, margin = torch.randn(3, n, generator=generator(seed), dtype=dtype)
    margin = margin if with_margin else None
    chosen.requires_grad_()
    theirs, _ = via_trl.pairs(chosen, rejected, margin)
    ours = bradley_terry_loss(chosen, rejected, margin)
    agree(ours, theirs, dtype)
    agree(gradient(ours, chosen), gradient(theirs, chosen), dtype)


@against("trl", pair_accuracy, note="of given pairs; ours is of all whose targets differ")
@given(seed=seeds)
def test_accuracy_by_trl(dtype, seed):
    """Of one pair."""
    scores = torch.randn(2, generator=generator(seed), dtype=dtype)
    _, log = via_trl.pairs(scores[:1], scores[1:])
    agree(pair_accuracy(scores, torch.tensor([1.0, 0.0], dtype=dtype), 0), log["accuracy"], dtype)


@against("scipy", pair_accuracy, note="Somers' D is 2·accuracy − 1")
@given(items=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=9))
def test_accuracy_by_scipy(dtype, items):
    scores, targets = torch.tensor(items, dtype=dtype).unbind(1)
    assume(len(set(targets.tolist())) > 1 and len(set(scores.tolist())) > 1)
    with np.errstate(all="ignore"):  # of the p-value
        theirs = scipy.stats.somersd(targets.numpy(), scores.numpy()).statistic
    agree(2 * pair_accuracy(scores, targets, 0) - 1, theirs, dtype)


@against("tensorflow-probability", plackett_luce_loss, bradley_terry_loss)
@given(n=st.sampled_from([1, 3]), ranks=st.sampled_from([2, 3, 6]), seed=seeds)
def test_plackett_luce_by_tfp(dtype, n, ranks, seed):
    scores = torch.randn(n, ranks, generator=generator(seed), dtype=dtype)
    theirs = via_rlax.call(_plackett_luce, scores)
    agree(plackett_luce_loss(scores, torch.ones(n, ranks, dtype=torch.bool)), -theirs.mean(), dtype)
    if ranks == 2:
        agree(bradley_terry_loss(scores[:, 0], scores[:, 1]), -theirs.mean(), dtype)


def _plackett_luce(scores):
    ranking = jnp.broadcast_to(jnp.arange(scores.shape[1]), scores.shape)
    return tfp.distributions.PlackettLuce(jnp.exp(scores)).log_prob(ranking)


@against("rlax", regression_loss, note="½ of ours")
@given(**sizes)
def test_regression_by_rlax(dtype, n, seed):
    pred, target = torch.randn(2, n, generator=generator(seed), dtype=dtype)
    agree(regression_loss(pred, target), 2 * via_rlax.call(rlax.l2_loss, pred, target).mean(), dtype)


@against("torchrl", regression_loss)
@given(**sizes)
def test_regression_by_torchrl(dtype, n, seed):
    pred, target = torch.randn(2, n, generator=generator(seed), dtype=dtype)
    agree(regression_loss(pred, target), distance_loss(pred, target, "l2").mean(), dtype)
