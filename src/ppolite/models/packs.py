"""Rows of different lengths laid end to end, so that the model works on tokens alone and on no padding.

    packs = Packs.of(lengths, T, P, device)     who stands where
    packs.lay(seqs.hidden_BTD)                       [B, T, …] → [K, L, …]
    packs.masks(config, dtype)                  what a place may look at: the shared prefix, its own row up to itself
    hidden_KLD.flatten(0, 1)[packs.place_BT]    what came out, [B, T, D]

Answers to prompts differ in length several times over: padded to the longest, half of a batch of film reviews is
nothing. Packs are no longer than they need to be, since every place of one is compared with every other in attention.

Left out: kernels for variable lengths, which want another layout for each kind of attention.

Axes: B rows, T tokens of a row, K packs, L places in a pack, P tokens of the shared prefix, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ppolite.ops.packing import even_batches

LENGTH = 128
"""Places of a pack where no row is longer: at 256 the 135M model spends a tenth of a layer on attention."""


def kinds_of(config: PreTrainedConfig) -> set[str] | None:
    """Which kinds of attention a model has; None where a mask cannot say what they look at."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    known = {"full_attention", "sliding_attention"}
    masked = config._attn_implementation in ("sdpa", "eager") and not hasattr(config, "attention_layers")
    return set(kinds) if masked and set(kinds) <= known else None


@dataclass
class Packs:
    """Where each token of each row stands."""

    row_KL: Tensor
    """The row that a place belongs to; −1 for an empty one."""
    col_KL: Tensor
    """Its token; 0 for an empty place."""
    place_BT: Tensor
    """The place of each token, counted through all packs; 0 for padding."""
    prefix: int
    """P."""

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, prefix: int, device: torch.device) -> Packs:
        """Rows of these lengths, out of [B, `width`], behind `prefix` shared tokens."""
        packs = even_batches(lengths, max(LENGTH, max(lengths)))
        L = max(sum(lengths[i] for i in pack) for pack in packs)
        row_KL = torch.full((len(packs), L), -1)
        col_KL = torch.zeros(len(packs), L, dtype=torch.long)
        place_BT = torch.zeros(len(lengths), width, dtype=torch.long)
        for k, pack in enumerate(packs):
            begin = 0
            for i in pack:
                n = lengths[i]
                here = slice(begin, begin + n)
                row_KL[k, here], col_KL[k, here] = i, torch.arange(n)
                place_BT[i, :n] = k * L + torch.arange(begin, begin + n)
                begin += n
        return cls(row_KL.to(device), col_KL.to(device), place_BT.to(device), prefix)

    def __len__(self) -> int:
        return self.row_KL.shape[0]

    @property
    def position_KL(self) -> Tensor:
        """Of each place, counted from the first token of the prefix."""
        return self.prefix + self.col_KL

    def lay(self, x_BT: Tensor) -> Tensor:
        """Tokens at their places, [B, T, …] → [K, L, …]; anything at the empty ones."""
        return x_BT[self.row_KL.clamp(min=0), self.col_KL]

    def masks(self, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
        """What the model takes as `attention_mask`: [K, 1, L, P + L], or one for each kind of its layers."""
        kinds = kinds_of(config)
        assert kinds is not None
        made = {kind: _as_wanted(self._allowed(config, kind), config, dtype) for kind in kinds}
        return made if getattr(config, "layer_types", None) and len(kinds) > 1 else made.popitem()[1]

    def _allowed(self, config: PreTrainedConfig, kind: str) -> Tensor:
        """True where place l may look at a token of the prefix, or at a place of its pack."""
        K, L = self.row_KL.shape
        place_L = torch.arange(L, device=self.row_KL.device)
        own_KLL = self.row_KL[:, :, None] == self.row_KL[:, None, :]
        own_KLL = own_KLL & (place_L[:, None] >= place_L)
        prefix_KLP = own_KLL.new_ones(K, L, self.prefix)
        if kind == "sliding_attention":
            window: int = config.sliding_window
            own_KLL = own_KLL & (place_L[:, None] - place_L < window)
            position_P = torch.arange(self.prefix, device=self.row_KL.device)
            prefix_KLP = self.position_KL[:, :, None] - position_P < window
        return torch.cat([prefix_KLP, own_KLL], 2)[:, None]


def _as_wanted(allowed: Tensor, config: PreTrainedConfig, dtype: torch.dtype) -> Tensor:
    """Booleans for fused attention; for the plain one numbers that are added to the scores."""
    if config._attn_implementation == "sdpa":
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
