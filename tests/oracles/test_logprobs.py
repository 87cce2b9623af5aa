"""Log-probs and entropies in chunks, against those from whole logits."""

from __future__ import annotations

import rlax
import torch
import via_rlax
from hypothesis import given
from hypothesis import strategies as st
from oracle import against, agree, generator, gradient, seeds
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from ppolite.ops.logprobs import token_logprobs

sizes = {"n": st.integers(1, 7), "vocabulary": st.integers(2, 9), "seed": seeds, "chunk": st.integers(1, 4)}


def head(n, vocabulary, seed, dtype):
    g = generator(seed)
    hidden, weight = (
        torch.randn(rows, 4, generator=g, dtype=dtype, requires_grad=True) for rows in (n, vocabulary)
    )
    return hidden, weight, torch.randint(vocabulary, (n,), generator=g)


@against("trl", token_logprobs)
@given(**sizes)
def test_by_trl(dtype, n, vocabulary, seed, chunk):
    hidden, weight, targets = head(n, vocabulary, seed, dtype)
    ours, theirs = [], []
    for out, (logprobs, entropy) in (
        (ours, token_logprobs(hidden, weight, targets, chunk=chunk)),
        (theirs, (selective_log_softmax(hidden @ weight.T, targets), entropy_from_logits(hidden @ weight.T))),
    ):
        out.extend([logprobs, entropy])
        out.extend(gradient((logprobs + 2 * entropy).sum(), hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, dtype, scale=10)


@against("rlax", token_logprobs)
@given(
    n=st.sampled_from([1, 6]), vocabulary=st.sampled_from([2, 9]), seed=seeds, temperature=st.floats(0.25, 4)
)
def test_by_rlax(dtype, n, vocabulary, seed, temperature):
    hidden, weight, targets = head(n, vocabulary, seed, dtype)
    logprobs, entropy = token_logprobs(hidden, weight, targets, chunk=4, temperature=temperature)
    logits, scale = hidden @ weight.T, 10 / temperature
    agree(logprobs, via_rlax.call(_logprob, logits, targets, temperature), dtype, scale=scale)
    agree(entropy, via_rlax.call(_entropy, logits, temperature), dtype, scale=scale)


def _logprob(logits, targets, temperature):
    return rlax.softmax(temperature).logprob(targets, logits)


def _entropy(logits, temperature):
    return rlax.softmax(temperature).entropy(logits)
