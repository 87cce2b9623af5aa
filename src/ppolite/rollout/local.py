"""Draw responses with the policy itself: run the last token of every live row, draw the next, again and again.

    Waiting      prompts in the order of their length, run by the group before they are needed   (prefill.py)
    SlotCache    a place for each of up to `max_rows` rows, whatever their age                   (models/slots.py)
    plain        the policy as it is at the call, its adapters merged                            (models/plain.py)
    prepacked    its weights as products of a few rows want them                                 (models/prepacked.py)
    draw         tokens and log-probs from logits                                                (draw.py)

A row that ended gives its place to a waiting prompt at once; when none waits, the last row moves into the gap, so that
the batch is as large as there is work. Each row has its own stream of uniform numbers, derived from its prompt, so
that what a prompt is answered depends neither on its neighbours nor on the batch size nor on when its turn came
(but for float rounding at the border between two tokens).

The host looks at the tokens after every step on a CPU, where it costs nothing, and after every eighth on a GPU, which
need not wait for it in between: a row that ends there runs on for up to seven tokens that are thrown away.

Left out: CUDA graphs and compiled steps, untried for want of a GPU.

Axes: B live rows, k tokens between two looks, N prompts, R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppolite.data.chat import encode_prompt
from ppolite.models.body import Body
from ppolite.models.decoder import arithmetic, last_hidden
from ppolite.models.plain import plain
from ppolite.models.prepacked import prepacked, prepacking
from ppolite.models.slots import SlotCache
from ppolite.rollout.draw import draw, uniforms
from ppolite.rollout.prefill import Waiting
from ppolite.types import Finish, Prompt, Rollout, Sampling


@dataclass
class _Row:
    """A response that is being drawn."""

    prompt: int
    """Its index in the call."""
    prompt_ids: list[int]
    uniform_R: Tensor
    """Its own numbers, as many as it may have tokens."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def last(self) -> int:
        """The token to be run next."""
        return (self.tokens or self.prompt_ids)[-1]

    @property
    def position(self) -> int:
        """Where that token stands."""
        return len(self.prompt_ids) + len(self.tokens) - 1

    def take(self, tokens: Sequence[int], logprobs: Sequence[float], stop_ids: frozenset[int]) -> None:
        """Add what was drawn, up to the first stop token or the limit."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            if not self.ended:
                self.tokens.append(token)
                self.logprobs.append(logprob)
                self.ended = token in stop_ids or len(self.tokens) == len(self.uniform_R)


class LocalGenerator:
    """`Generator` over a body of this process. `version` counts the updates the policy has seen.

    `max_rows` are generated side by side; `look_every` is how many tokens are drawn before the host looks which of
    them have ended.
    """

    def __init__(
        self,
        body: Body,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: frozenset[int],
        *,
        max_rows: int = 64,
        look_every: int | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> None:
        self.body, self.tokenizer, self.stop_ids = body, tokenizer, stop_ids
        self.max_rows, self.tick = max_rows, tick
        self.look_every = look_every or (1 if body.device.type == "cpu" else 8)
        self.version = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        """One response for each prompt, in order; the same seed gives the same responses.

        A prompt that stands there several times is answered anew each time.
        """
        ids = [encode_prompt(self.tokenizer, p) for p in prompts]
        rollouts: dict[int, Rollout] = {}
        # One context for the whole call: autocast casts a trained weight once in it.
        with arithmetic(self.body.device, self.body.dtype):
            for row in self._rows(ids, sampling, seed):
                rollouts[row.prompt] = self._rollout(prompts[row.prompt], row)
                if self.tick:
                    self.tick(1)
        return [rollouts[i] for i in range(len(prompts))]

    def _rollout(self, prompt: Prompt, row: _Row) -> Rollout:
        finish: Finish = "stop" if row.tokens[-1] in self.stop_ids else "length"
        shown = row.tokens[:-1] if finish == "stop" else row.tokens
        text = str(self.tokenizer.decode(shown, skip_special_tokens=True))
        logprobs_R = torch.tensor(row.logprobs)
        return Rollout(prompt, row.prompt_ids, row.tokens, text, logprobs_R, finish, self.version)

    @torch.inference_mode()
    def _rows(self, ids: list[list[int]], sampling: Sampling, seed: int) -> Iterator[_Row]:
        """All rows, each as it ends."""
        if not ids:
            return
        R = sampling.max_new_tokens
        uniform_NR = uniforms(ids, R, seed)
        # A product of one row reads each weight once, however it is laid out.
        prepack = len(ids) > 1 and prepacking(self.body, self.body.device) > 0
        decoder = plain(self.body, prepack=prepack)
        head: Callable[[Tensor], Tensor] = self.body.logits
        if prepack:
            assert self.body.head is not None
            head = partial(self.body.logits, head=prepacked(self.body.head, self.body.dtype))
        waiting = Waiting(decoder, ids, self.body.device)
        # The last token drawn is never run, so it needs no room.
        room = max(map(len, ids)) + R - 1
        cache = SlotCache(decoder.config, min(self.max_rows, len(ids)), room, self.body.dtype)
        rows = [_Row(i, ids[i], uniform_NR[i]) for i in waiting.admit(cache, range(cache.rows))]
        while rows:
            self._extend(decoder, head, cache, rows, sampling)
            yield from (row for row in rows if row.ended)
            free = [place for place, row in enumerate(rows) if row.ended]
            for place, i in zip(free, admitted := waiting.admit(cache, free), strict=False):
                rows[place] = _Row(i, ids[i], uniform_NR[i])
            if len(admitted) < len(free):
                rows = _closed(rows, cache)

    def _extend(
        self,
        decoder: PreTrainedModel,
        head: Callable[[Tensor], Tensor],
        cache: SlotCache,
        rows: Sequence[_Row],
        sampling: Sampling,
    ) -> None:
        """Draw tokens for every row until the host looks again."""
        device = self.body.device
        k = min(self.look_every, max(len(row.uniform_R) - len(row.tokens) for row in rows))
        uniform_Bk = pad_sequence([row.uniform_R[len(row.tokens) :][:k] for row in rows], batch_first=True)
        uniform_kB = uniform_Bk.T.to(device)
        token_B = torch.tensor([row.last for row in rows], device=device)
        position_B = torch.tensor([row.position for row in rows], device=device)
        first, last = (extreme(row.position for row in rows) for extreme in (min, max))
        drawn: list[tuple[Tensor, Tensor]] = []
        for step in range(k):
            # A row that has ended meanwhile goes on, within its own place, until the host looks.
            at_B = (position_B + step).clamp(max=cache.length - 1)
            cache.at(at_B, first + step, min(last + step, cache.length - 1))
            hidden_B1D = last_hidden(
                decoder,
                input_ids=token_B[:, None],
                attention_mask=cache.mask_BT,
                position_ids=at_B[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            token_B, logp_B = draw(head(hidden_B1D[:, 0]), uniform_kB[step], sampling)
            drawn.append((token_B, logp_B))
        tokens_Bk, logprobs_Bk = (torch.stack(x, 1).tolist() for x in zip(*drawn, strict=True))
        for row, tokens, logprobs in zip(rows, tokens_Bk, logprobs_Bk, strict=True):
            row.take(tokens, logprobs, self.stop_ids)


def _closed(rows: Sequence[_Row], cache: SlotCache) -> list[_Row]:
    """The live rows without gaps between them: the last ones have moved into the places of those that ended."""
    live = list(rows)
    count = sum(not row.ended for row in rows)
    gaps = [place for place in range(count) if rows[place].ended]
    sources = [place for place in range(count, len(rows)) if not rows[place].ended]
    if gaps:
        cache.move(sources, gaps)
    for source, gap in zip(sources, gaps, strict=True):
        live[gap] = live[source]
    return live[:count]
