"""A body's decoder for generating: the adapters without PEFT's wrappers, and products that suit a few rows.

    decoder = plain(body)      # a view like `body.whole`: what is not adapted is shared with it

A wrapper costs a decoded token two small products and some ten small operations for each linear layer. In float32
an adapter is added into a copy of the weight. In half precision it stays beside the weight: added and rounded, a young
adapter would be gone (docs/decisions/0009).

A copy is as old as the call that made it. So it is made for one generation and dropped with it: nothing is refreshed,
and there is no old one to be taken by mistake. A body without adapters needs no copy: its own layers run, and autocast
keeps the half-precision cast of a trained weight for as long as the generation lasts.

A decoded token's products have as many rows as there are answers. For so few, MKL is far from the chip's ceiling in
the order that `nn.Linear` asks for, x Wᵀ, and nearer to it in the other, W xᵀ: a token through the layers of the 135M
model takes 219 ms in place of 281 for 32 rows, 147 of 212 for 16, 76 of 137 for 4 (two cores with AVX2). So in float32
on a CPU the view's linear layers take that one; rounding is all that changes.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppolite.models.body import Body, layer_path, layers_of, view

THIN_ROWS = 128
"""Up to so many rows W xᵀ was the faster order; from 256 on there is nothing between the two."""


def plain(body: Body) -> PreTrainedModel:
    """The body's decoder from token ids, with its adapters as they are now: their weights, and whether they are on."""
    name, _ = layer_path(body.decoder)
    layers: list[nn.Module] = [_plain(layer, body.dtype) for layer in layers_of(body.whole)]
    if body.device.type == "cpu" and body.dtype == torch.float32 and torch.backends.mkl.is_available():
        layers = [_thin(layer) for layer in layers]
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


def _thin(module: nn.Module) -> nn.Module:
    """A view of the module whose linear layers are `_Thin`; those of other classes may compute otherwise, and stay."""
    if type(module) is nn.Linear:
        thin = _Thin(module.in_features, module.out_features, bias=False, device="meta")
        thin._parameters = dict(module._parameters)
        return thin
    return view(module, {name: _thin(child) for name, child in module.named_children()})


class _Thin(nn.Linear):
    """The same product, as W xᵀ where there are few rows."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name it has in nn.Linear)
        rows = input.shape[:-1].numel()
        if rows > THIN_ROWS:
            return super().forward(input)
        y = (self.weight @ input.reshape(rows, -1).T).T.contiguous()
        return (y if self.bias is None else y.add_(self.bias)).view(*input.shape[:-1], -1)


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
