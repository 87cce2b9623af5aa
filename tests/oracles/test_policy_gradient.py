"""A2C, and the policy gradient on another policy's data: values where libraries define them, else gradients."""

from __future__ import annotations

import math

import numpy as np
import rlax
import torch
import via_rlax
import via_sb3
import via_torchrl
import via_trl
from hypothesis import given
from hypothesis import strategies as st
from oracle import SINGLE, against, agree, bounds, generator, gradient, random_tokens, seeds
from stable_baselines3 import A2C
from torchrl.objectives import A2CLoss, PPOLoss

from ppolite.ops.policy_gradient import importance_weighted_loss, policy_gradient_loss

# rlax is compiled for each shape, of which the mask makes more.
tokens = {"n": st.sampled_from([1, 4, 9]), "choices": st.sampled_from([2, 5]), "seed": seeds}


@against("torchrl", policy_gradient_loss)
@given(**tokens)
def test_a2c_by_torchrl(dtype, n, choices, seed):
    t = random_tokens(n, choices, seed, dtype)
    loss, _ = policy_gradient_loss(t.unseen(t.logprobs(t.new)), t.unseen(t.advantages), t.mask)
    theirs = via_torchrl.policy_loss(A2CLoss, t)
    agree(loss, theirs.out["loss_objective"], dtype, scale=1)
    agree(gradient(loss, t.new), theirs.gradient, dtype)


@against("rlax", policy_gradient_loss)
@given(**tokens)
def test_a2c_by_rlax(dtype, n, choices, seed):
    t = random_tokens(n, choices, seed, dtype)
    loss, _ = policy_gradient_loss(t.unseen(t.logprobs(t.new)), t.unseen(t.advantages), t.mask)
    data = [x[t.mask] for x in (t.new, t.actions, t.advantages)]
    theirs = via_rlax.call(rlax.policy_gradient_loss, *data, torch.ones_like(data[2]))
    agree(loss, theirs, dtype)


@against("stable-baselines3", policy_gradient_loss, dtypes=SINGLE)
@given(n=st.integers(1, 9), seed=seeds)
def test_a2c_by_sb3(dtype, n, seed):
    new, values, advantages, returns = torch.randn(4, n, generator=generator(seed), dtype=dtype)
    theirs = via_sb3.train(
        A2C,
        logprobs=new,
        values=values,
        old_logprobs=new,
        old_values=values,
        advantages=advantages,
        returns=returns,
    )
    new.requires_grad_()
    loss, _ = policy_gradient_loss(new, advantages, torch.ones(n, dtype=torch.bool))
    agree(loss, theirs.log["train/policy_loss"], dtype)
    agree(gradient(loss, new), theirs.logprob_grad, dtype)


@against("torchrl", importance_weighted_loss, note="its loss is −w A; the gradients agree")
@given(**tokens, cap=st.none() | bounds.map(lambda x: 4 * x))
def test_step_weights_by_torchrl(dtype, n, choices, seed, cap):
    """PPO's surrogate without a clip, and with `max_importance_ratio`, beyond which it goes on learning."""
    t = random_tokens(n, choices, seed, dtype)
    loss, _ = importance_weighted_loss(
        t.unseen(t.logprobs(t.new)), t.unseen(t.logprobs(t.old)), t.unseen(t.advantages), t.mask, truncate=cap
    )
    agree(
        gradient(loss, t.new), via_torchrl.policy_loss(PPOLoss, t, max_importance_ratio=cap).gradient, dtype
    )


@against("trl", importance_weighted_loss)
@given(rows=st.integers(1, 3), columns=st.integers(2, 6), seed=seeds, cap=st.none() | st.floats(0.25, 4))
def test_step_weights_by_trl(dtype, rows, columns, seed, cap):
    """CISPO is this loss: a capped weight without a gradient in front of A log π."""
    g = generator(seed)
    new, old, advantages = torch.randn(3, rows, columns, generator=g, dtype=dtype)
    mask = torch.rand(rows, columns, generator=g) < 0.7
    mask[0, 0] = True
    new.requires_grad_()
    hidden = lambda x: torch.where(mask, x, torch.nan)  # noqa: E731
    loss, diagnostics = importance_weighted_loss(
        hidden(new), hidden(old), hidden(advantages), mask, truncate=cap
    )
    theirs, log = via_trl.grpo(
        new, old, advantages, mask, loss_type="cispo", high=1e9 if cap is None else cap
    )
    agree(loss, theirs, dtype)
    agree(gradient(loss, new), gradient(theirs, new), dtype)
    if (advantages > 0)[mask].all():  # it counts good actions only
        agree(diagnostics["clip_fraction"], log["cispo_clip_ratio"], dtype)


def loops(log_ratio: list[float], ended: list[bool], kind: str, cap: float) -> list[float]:
    """Weights of one row, as products over its episodes."""
    weights: list[float] = []
    while len(weights) < len(log_ratio):
        start = len(weights)
        stop = next((t + 1 for t in range(start, len(ended)) if ended[t]), len(ended))
        for t in range(start, stop):
            last = {"step": t + 1, "per_decision": t + 1, "trajectory": stop}[kind]
            first = t if kind == "step" else start
            weights.append(min(math.exp(math.fsum(log_ratio[first:last])), cap))
    return weights


@against("rlax", importance_weighted_loss, note="its weights are an argument; here from a loop")
@given(
    **tokens, kind=st.sampled_from(["step", "per_decision", "trajectory"]), cap=st.none() | st.floats(0.25, 4)
)
def test_weights_of_every_kind_by_rlax(dtype, n, choices, seed, kind, cap):
    """A row with several episodes and gaps; rlax gets its True places."""
    t = random_tokens(n, choices, seed, dtype)
    ended = torch.rand(n, generator=generator(seed + 1)) < 0.3
    new, behaviour = t.logprobs(t.new), t.logprobs(t.behaviour)
    loss, _ = importance_weighted_loss(
        *(t.unseen(x)[None] for x in (new, behaviour, t.advantages)),
        t.mask[None],
        kind=kind,
        truncate=cap,
        ended_BR=ended[None],
    )
    # A masked end is no end: it did not happen.
    places = t.mask.nonzero()[:, 0].tolist()
    log_ratio = (new - behaviour).detach().double()[places].tolist()
    weights = loops(log_ratio, ended[places].tolist(), kind, math.inf if cap is None else cap)
    data = (t.new[places], t.actions[places], t.advantages[places], torch.tensor(weights, dtype=dtype))
    agree(loss, via_rlax.call(rlax.policy_gradient_loss, *data), dtype, scale=max(weights))
    theirs = np.zeros_like(t.new.detach().numpy())
    theirs[places] = via_rlax.call(_gradient, *data)
    agree(gradient(loss, t.new), theirs, dtype, scale=max(weights))


def _gradient(logits, *data):
    import jax

    return jax.grad(rlax.policy_gradient_loss)(logits, *data)
