"""Tokens from logits, by numbers that belong to the row.

    draw        inversion of the distribution function, with the log-prob of what was drawn
    uniforms    each prompt's own stream of numbers, so that its answer depends on nobody else

Axes: B rows, V vocabulary, K the likeliest tokens, N prompts, R response tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ppolite.types import Sampling


def draw(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens [B] by inversion of the distribution function at `uniform_B`, and their log-probs [B], nats.

    The distribution is softmax(logits / temperature), cut to the smallest set of tokens that holds `top_p`. The
    logits are used up: both are applied in place.
    """
    if sampling.temperature != 1:
        logits_BV.div_(sampling.temperature)
    if sampling.top_p < 1:
        _cut(logits_BV, sampling.top_p)
    top_B1 = logits_BV.amax(-1, keepdim=True)
    p_BV = (logits_BV - top_B1).exp_()
    if p_BV.is_cuda and len(p_BV) == 1:
        # CUDA sums a lone row by another scan, whose sums need not grow with the tokens.
        p_BV = p_BV.repeat(2, 1)
    cdf_BV = p_BV.cumsum_(-1)[: len(logits_BV)]
    total_B1 = cdf_BV[:, -1:]
    # Below the total wherever rounding puts u·total, since no token lies beyond. And a token without mass is never the
    # first whose sum is larger than something.
    target_B1 = torch.minimum(uniform_B[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    # A broken policy's NaN is never reached; its last token has log-prob NaN, which the trainer sees.
    token_B1 = torch.searchsorted(cdf_BV, target_B1, right=True).clamp(max=logits_BV.shape[1] - 1)
    return token_B1[:, 0], (logits_BV.gather(1, token_B1) - top_B1 - total_B1.log())[:, 0]


def _cut(logits_BV: Tensor, top_p: float) -> None:
    """−inf in place of all but the smallest set of tokens that holds `top_p`.

    Sorting a vocabulary takes longer than a small model's layers, so only the likeliest tokens are sorted: more of them
    until every row's set is among them.
    """
    V = logits_BV.shape[1]
    K = V if logits_BV.is_cuda else 512  # a GPU sorts quickly, and should not wait for the host to look
    p_BV = logits_BV.softmax(-1)
    while True:
        p_BK, token_BK = p_BV.topk(min(K, V))
        outside_BK = p_BK.cumsum(-1) - p_BK >= top_p
        if K >= V or outside_BK[:, -1].all():
            break
        K *= 8
    kept_BK = logits_BV.gather(1, token_BK).masked_fill_(outside_BK, -torch.inf)
    logits_BV.fill_(-torch.inf).scatter_(1, token_BK, kept_BK)


def uniforms(ids: Sequence[Sequence[int]], count: int, seed: int) -> Tensor:
    """Numbers in [0, 1) for each row, [N, count]; they depend on the seed, its ids, and which copy it is."""
    copies: Counter[tuple[int, ...]] = Counter()
    uniform_NR = torch.empty(len(ids), count)
    for i, row in enumerate(map(tuple, ids)):
        digest = hashlib.blake2b(repr((seed, copies[row], row)).encode(), digest_size=7).digest()
        copies[row] += 1
        stream = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        uniform_NR[i] = torch.rand(count, generator=stream)
    return uniform_NR
