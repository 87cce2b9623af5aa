"""Layers that keep their input alone and compute the rest again in the backward pass (arXiv 1604.06174).

    layers = [Recomputed(layer, i) for i, layer in enumerate(layers)]      # the same ones, each run twice

What a layer keeps for its backward pass is a dozen times its input. HF's own switch needs train mode and has no
cache; here the model stays in eval mode, and the cache is where the keys and values of the shared prefix are. Into it
a layer writes, which must not happen again when the layer is computed again. So every call works on a cache of its
own, made from the prefix's keys and values as they are; and what a run over the prefix itself has left there goes into
the model's cache as a result of the layer, with its gradient. The prefix is repeated for the rows inside the layer, and
so is not kept either.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache


class Recomputed(nn.Module):
    """Layer `index`. The model's cache holds the prefix once, whatever the number of rows."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.layer, self.index = layer, index
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer, index = self.layer, self.index
        caches = [x for x in (*args, *kwargs.values()) if isinstance(x, DynamicCache)]
        if not caches:
            return checkpoint(
                layer, hidden_states, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )
        # A copy as it is now: were the model's cache itself in the closure, the graph would hold what holds the graph.
        before = _copy(caches[0])
        args, kwargs = _with(before, args, kwargs)

        def run(hidden_states: Tensor) -> tuple[Any, Tensor, Tensor]:
            own = _copy(before)
            kept: list[Any] = own.layers
            if index < len(kept):
                kept[index].batch_repeat_interleave(len(hidden_states))
            again, named = _with(own, args, kwargs)
            out = layer(hidden_states, *again, **named)
            return out, kept[index].keys, kept[index].values

        out, keys, values = checkpoint(run, hidden_states, use_reentrant=False, preserve_rng_state=False)
        if index == len(caches[0].layers):  # this is the prefix
            caches[0].update(keys, values, index)
        return out


def _copy(cache: DynamicCache) -> DynamicCache:
    """The same keys and values; what is added to one of the two is not in the other."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def _with(
    cache: DynamicCache, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer, with this cache in place of theirs, wherever a family has it among them."""
    put = lambda x: cache if isinstance(x, DynamicCache) else x  # noqa: E731
    return tuple(map(put, args)), {name: put(x) for name, x in kwargs.items()}
