"""Draw responses with the policy itself: prefill, then one token a row at a time.

Rows that ended leave the batch, and the front that all prompts share is run once. Each row has its own stream
of uniform numbers, derived from its prompt, so that what a prompt is answered depends neither on its
neighbours nor on the batch size nor on the order (but for float rounding at the border between two tokens).

Left out: continuous refilling of freed rows and CUDA graphs.

Axes: B live rows, P shared prefix, S ragged rest of the prompts (left-padded), V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedTokenizerBase

from ppolite.data.chat import encode_prompt
from ppolite.models.body import Body, arithmetic, last_hidden
from ppolite.ops.packing import common_prefix
from ppolite.types import Finish, Prompt, Rollout, Sampling


def draw(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens [B] by inversion of the distribution function at `uniform_B`, and their log-probs [B], nats.

    The distribution is softmax(logits / temperature), cut to the smallest set of tokens that holds `top_p`.
    """
    logp_BV = (logits_BV / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logp_BV.sort(-1, descending=True)
        before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
        sorted_BV = sorted_BV.masked_fill(before_BV >= sampling.top_p, -torch.inf).log_softmax(-1)
        logp_BV = torch.full_like(logp_BV, -torch.inf).scatter(1, order_BV, sorted_BV)
    cdf_BV = logp_BV.exp().cumsum(-1)
    token_B1 = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True)
    # Rounding may leave u·total at the very top, past the last token of non-zero mass.
    last_B1 = (cdf_BV < cdf_BV[:, -1:]).sum(-1, keepdim=True).clamp(max=cdf_BV.shape[-1] - 1)
    token_B1 = torch.minimum(token_B1, last_B1)
    return token_B1[:, 0], logp_BV.gather(1, token_B1)[:, 0]


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


def _sees_all(config: PreTrainedConfig) -> bool:
    """Whether every layer attends to everything.

    A window counts cache slots: padding between the shared prefix and a row's rest would use some up.
    """
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is not None:
        return set(kinds) <= {"full_attention", "global"}
    return getattr(config, "sliding_window", None) is None


@dataclass
class _Rows:
    """The live rows of one batch: who they are, their last token, mask and position."""

    index: list[int]
    mask_BT: Tensor
    position_B: Tensor
    cache: DynamicCache

    def keep(self, alive: list[int]) -> None:
        pick = torch.tensor(alive, device=self.mask_BT.device)
        self.index = [self.index[i] for i in alive]
        self.mask_BT, self.position_B = self.mask_BT[pick], self.position_B[pick]
        self.cache.batch_select_indices(pick)


class LocalGenerator:
    """`Generator` over a body of this process. `version` counts the updates the policy has seen."""

    def __init__(
        self,
        body: Body,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: frozenset[int],
        *,
        max_rows: int = 64,
        tick: Callable[[int], None] | None = None,
    ) -> None:
        self.body, self.tokenizer, self.stop_ids = body, tokenizer, stop_ids
        self.max_rows, self.tick = max_rows, tick
        self.version = 0
        self._may_share = _sees_all(body.decoder.config)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        """One response for each prompt, in order; the same seed gives the same responses.

        A prompt that stands there several times is answered anew each time.
        """
        ids = [encode_prompt(self.tokenizer, p) for p in prompts]
        uniform_NR = uniforms(ids, sampling.max_new_tokens, seed)
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        rollouts: list[Rollout | None] = [None] * len(ids)
        for first in range(0, len(ids), self.max_rows):
            batch = by_length[first : first + self.max_rows]
            # One context for all tokens of a batch: autocast casts a trained weight once in it.
            with arithmetic(self.body.device, self.body.dtype):
                answers = self._batch([ids[i] for i in batch], uniform_NR[batch], sampling)
            for i, (tokens, logprobs) in zip(batch, answers, strict=True):
                rollouts[i] = self._rollout(prompts[i], ids[i], tokens, logprobs)
                if self.tick:
                    self.tick(1)
        return [r for r in rollouts if r is not None]

    def _rollout(self, prompt: Prompt, ids: list[int], tokens: list[int], logprobs: list[float]) -> Rollout:
        finish: Finish = "stop" if tokens[-1] in self.stop_ids else "length"
        shown = tokens[:-1] if finish == "stop" else tokens
        text = str(self.tokenizer.decode(shown, skip_special_tokens=True))
        return Rollout(prompt, ids, tokens, text, torch.tensor(logprobs), finish, self.version)

    def _batch(
        self, ids: list[list[int]], uniform_BR: Tensor, sampling: Sampling
    ) -> list[tuple[list[int], list[float]]]:
        device, decoder = self.body.device, self.body.whole
        uniform_BR = uniform_BR.to(device)
        rows, hidden_BD = self._prefill(ids)
        out: list[tuple[list[int], list[float]]] = [([], []) for _ in ids]
        for r in range(sampling.max_new_tokens):
            token_B, logp_B = draw(self.body.logits(hidden_BD), uniform_BR[rows.index, r], sampling)
            tokens = token_B.tolist()
            for i, token, logp in zip(rows.index, tokens, logp_B.tolist(), strict=True):
                out[i][0].append(token)
                out[i][1].append(logp)
            alive = [b for b, token in enumerate(tokens) if token not in self.stop_ids]
            if not alive or r + 1 == sampling.max_new_tokens:
                break
            if len(alive) < len(tokens):
                rows.keep(alive)
                token_B = token_B[alive]
            rows.mask_BT = torch.cat([rows.mask_BT, rows.mask_BT.new_ones(len(alive), 1)], 1)
            rows.position_B = rows.position_B + 1
            hidden_BD = last_hidden(
                decoder,
                input_ids=token_B[:, None],
                attention_mask=rows.mask_BT,
                position_ids=rows.position_B[:, None],
                past_key_values=rows.cache,
                use_cache=True,
            )[:, 0]
        return out

    def _prefill(self, ids: list[list[int]]) -> tuple[_Rows, Tensor]:
        """Run the prompts; hidden state [B, D] of each one's last token."""
        device, decoder = self.body.device, self.body.whole
        B = len(ids)
        P = common_prefix(ids) if self._may_share else 0
        S = max(len(row) for row in ids) - P
        cache = DynamicCache()
        if P:
            prefix_1P = torch.tensor([ids[0][:P]], device=device)
            decoder(input_ids=prefix_1P, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(B)
        rest = [[0] * (S - len(row) + P) + row[P:] for row in ids]
        length_B = torch.tensor([len(row) for row in ids], device=device)
        pad_B = S + P - length_B
        column_S = torch.arange(S, device=device)
        mask_BT = torch.cat(
            [torch.ones(B, P, dtype=torch.bool, device=device), column_S[None] >= pad_B[:, None]], 1
        )
        hidden_BSD = last_hidden(
            decoder,
            input_ids=torch.tensor(rest, device=device),
            attention_mask=mask_BT,
            position_ids=(P + column_S[None] - pad_B[:, None]).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        return _Rows(list(range(B)), mask_BT, length_B - 1, cache), hidden_BSD[:, -1]
