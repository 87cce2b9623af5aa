"""A body's decoder for generating: the adapters without PEFT's wrappers.

    decoder = plain(body)      # a view like `body.whole`: what is not adapted is shared with it

A wrapper costs a decoded token two small products and some ten small operations for each linear layer. In float32
an adapter is added into a copy of the weight. In half precision it stays beside the weight: added and rounded, a young
adapter would be gone (docs/decisions/0009).

A copy is as old as the call that made it. So it is made for one generation and dropped with it: nothing is refreshed,
and there is no old one to be taken by mistake. A body without adapters needs no copy: its own layers run, and autocast
keeps the half-precision cast of a trained weight for as long as the generation lasts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppolite.models.body import Body
from ppolite.models.decoder import layer_path, layers_of, view
from ppolite.models.prepacked import prepacked


def plain(body: Body, *, prepack: bool = False) -> PreTrainedModel:
    """The body's decoder from token ids, with its adapters as they are now: their weights, and whether they are on.

    With `prepack` the linear layers hold copies of their weights (prepacked.py).
    """
    name, _ = layer_path(body.decoder)
    finish = partial(prepacked, dtype=body.dtype) if prepack else lambda layer: layer
    layers = [finish(_plain(layer, body.dtype)) for layer in layers_of(body.whole)]
    return view(body.whole, {name: nn.ModuleList(layers)})


def _plain(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module itself where there is no adapter in it, else a view of it."""
    if isinstance(module, BaseTunerLayer):
        return _linear(module, dtype)
    children = {name: (child, _plain(child, dtype)) for name, child in module.named_children()}
    changed = {name: new for name, (old, new) in children.items() if new is not old}
    return view(module, changed) if changed else module


def _linear(tuned: Any, dtype: torch.dtype) -> nn.Module:
    base = tuned.get_base_layer()
    if tuned.disable_adapters:
        return base
    if dtype.itemsize < 4:
        return _Beside(tuned)
    merged = view(base, {})
    weight = base.weight + tuned.get_delta_weight("default")
    merged._parameters = {**base._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return merged


class _Beside(nn.Module):
    """A linear layer and its adapter, in PEFT's order of operations."""

    def __init__(self, tuned: Any) -> None:
        super().__init__()
        self.base = tuned.get_base_layer()
        self.down, self.up, self.scaling = (
            part["default"] for part in (tuned.lora_A, tuned.lora_B, tuned.scaling)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * self.scaling
