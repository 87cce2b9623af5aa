"""A cache of keys and values with a fixed place for every row and token, for rows of any age side by side.

    cache = SlotCache(config, rows=64, length=200, dtype=torch.float32)
    cache.put([3, 0], prompts, [0, 0], [17, 17])    # places 3 and 0 begin with the first of the prompts that were run
    cache.at(position_B, longest)                   # where the next token of places 0..B-1 goes
    decoder(input_ids=token_B1, attention_mask=cache.mask_BT, past_key_values=cache, …)
    cache.move([3], [0])                            # the row in place 3 goes to place 0

The token at position p of a row is kept in slot p mod S of each layer. A layer that attends to everything has a slot
for each position. One with a window of W tokens has W of them, and what leaves the window is overwritten. In both, a
row at position p sees the slots up to p and no others, which is all that a mask has to say. So rows share no clock:
one begins while another ends, and no padding takes up a window. The model builds its masks from `mask_BT` and the
sizes below, as it does with the library's own caches.

Left out: pages. Every row has room for the longest.

Axes: N places, B live rows (the first places), S slots, T slots in use by the longest row, H key heads, D their size,
n rows that are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from ppolite.types import UserError


def windows(config: PreTrainedConfig) -> list[int | None]:
    """Each layer's attention window in tokens; None where it attends to everything.

    Raises UserError for layers that attend in another way.
    """
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    known = {"full_attention": None, "global": None, "sliding_attention": window}
    if others := sorted(set(kinds) - set(known)):
        raise UserError(
            f"{config.model_type}: ppolite cannot generate with layers of kind {others[0]}; choose a model whose"
            " layers attend to everything or to a sliding window"
        )
    return [known[kind] for kind in kinds]


@dataclass
class _Next:
    """The token that comes next in each live row; all layers look at the same one."""

    into: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """Where its keys and values go: row · S + position mod S, [B], for each S that layers have."""
    used: int = 0
    """Tokens of the longest row, that one included."""
    ragged: bool = False


class SlotCache(Cache):
    """Room for `rows` rows of `length` tokens, in `dtype` where that is half precision, else as they come."""

    def __init__(self, config: PreTrainedConfig, rows: int, length: int, dtype: torch.dtype) -> None:
        self.rows, self.length, self._next = rows, length, _Next()
        self.mask_BT: Tensor | None = None
        self._kept = [_Layer(self._next, rows, length, W, dtype) for W in windows(config)]
        super().__init__(layers=[*self._kept])

    def at(self, position_B: Tensor, shortest: int, longest: int) -> None:
        """Rows 0..B-1 go on at these positions, of which the host knows the extremes without asking the device."""
        following, device = self._next, position_B.device
        row_B = torch.arange(len(position_B), device=device)
        following.into = {S: row_B * S + position_B % S for S in {layer.slots for layer in self._kept}}
        following.used, following.ragged = longest + 1, shortest < longest
        self.mask_BT = None
        if following.ragged:
            self.mask_BT = torch.arange(longest + 1, device=device) <= position_B[:, None]

    def put(
        self, places: Sequence[int], prompts: Cache, which: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Each place gets the first `length` tokens of one row of `prompts`, which keeps position p in its slot p."""
        if not prompts.layers:  # nothing was run
            return
        sources: Any = prompts.layers[0]
        device, longest = sources.keys.device, sources.keys.shape[2]
        place_n1, which_n1, length_n1 = torch.tensor([places, which, lengths], device=device)[:, :, None]
        slots: dict[int, Tensor] = {}
        positions: dict[int, Tensor] = {}
        for S in {layer.slots for layer in self._kept}:
            slots[S] = torch.arange(min(S, longest), device=device)
            # The prompt's last position that falls into each slot; clamped, and masked, where none does.
            positions[S] = (length_n1 - 1 - (length_n1 - 1 - slots[S]) % S).clamp(min=0)
        for mine, theirs in zip(self._kept, prompts.layers, strict=False):
            mine.put((place_n1, slots[mine.slots]), theirs, (which_n1, positions[mine.slots]))

    def move(self, sources: Sequence[int], places: Sequence[int]) -> None:
        """Copy rows to places that are none of the sources."""
        keys = self._kept[0].keys
        assert keys is not None
        source_n, place_n = torch.tensor([sources, places], device=keys.device)
        for layer in self._kept:
            layer.move(source_n, place_n)


class _Layer(CacheLayerMixin):
    def __init__(self, next_: _Next, rows: int, length: int, window: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.next, self.rows, self.dtype = next_, rows, dtype
        self.slots = length if window is None else min(window, length)
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room. Zeros, since a masked value is multiplied by 0, which NaN would survive."""
        self.keys, self.values = (
            torch.zeros(
                (self.rows, self.slots, x.shape[1], x.shape[3]),
                dtype=self.dtype if self.dtype.itemsize < x.dtype.itemsize else x.dtype,
                device=x.device,
            )
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def _stores(self, key_states: Tensor, value_states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Both stores [N, S, H, D], each with what is to go into it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        return [(self.keys, key_states), (self.values, value_states)]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the next token of each row, [B, H, 1, D]; returns all that any row has, [B, H, T, D]."""
        into_B = self.next.into[self.slots]
        seen: list[Tensor] = []
        for store, new in self._stores(key_states, value_states):
            store.flatten(0, 1).index_copy_(0, into_B, new.squeeze(2).to(store.dtype))
            seen.append(store[: len(into_B), : self._used].transpose(1, 2))
        return seen[0], seen[1]

    def put(self, into: tuple[Tensor, Tensor], source: Any, which: tuple[Tensor, Tensor]) -> None:
        """Fill (place [n, 1], slot [S]) from (row [n, 1], position [n, S]) of the prompts."""
        row_n1, position_nS = which
        for store, prompts in self._stores(source.keys, source.values):
            store[into] = prompts[row_n1, :, position_nS].to(store.dtype)

    def move(self, source_n: Tensor, place_n: Tensor) -> None:
        for store in (self.keys, self.values):
            assert store is not None
            store[place_n, : self._used] = store[source_n, : self._used]

    @property
    def is_compileable(self) -> bool:
        """What makes the model build a mask without asking the device whether it needs one."""
        return self.next.ragged

    @property
    def _used(self) -> int:
        return min(self.slots, self.next.used)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width of the mask, and the position of its first column."""
        return self._used, 0

    def get_seq_length(self) -> int:
        """The query's own column: the mask's last, from which a window reaches back to all slots."""
        return self._used - 1

    def get_max_length(self) -> int:
        return self.slots
