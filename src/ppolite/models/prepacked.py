"""Linear layers whose weights are laid out beforehand for products of a few rows.

    size = prepacking(body, device)      # bytes of such a copy; 0 where a generation makes none
    layer = prepacked(layer)             # a view of it, each linear layer with a copy of its weight

A decoded token's products have as many rows as there are answers. For so few, the products of `nn.Linear` (MKL) are
far from the chip's ceiling. oneDNN's, which read a weight that was laid out for them, are nearer: with 576 × 1,536
weights 647 µs in place of 1,220 for 17 rows, 320 of 729 for 4; the head of the 135M model 29 ms in place of 84 for 32
(two cores with AVX2). To lay out all its weights takes a third of a second. So in float32 on a CPU a generation makes
such a copy and drops it at its end; rounding is all that changes.

Half precision is left as it is: no machine that multiplies it was at hand.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ppolite.models.body import Body
from ppolite.models.decoder import layers_of, view

PREPACKED_AT_MOST = 4 * 2**30
"""Bytes. A larger model generates from its own weights: the copy would be a good part of what it needs. A rule that
asked how much memory is free would make answers depend on it, by rounding."""


def prepacking(body: Body, device: torch.device) -> int:
    """Bytes of the copy that a generation on `device` makes.

    0 in half precision, on a GPU, without oneDNN on x86, and where they were more than `PREPACKED_AT_MOST`.
    """
    here = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    if not here or device.type != "cpu" or body.dtype != torch.float32:
        return 0
    heads = [] if body.head is None else [body.head]
    size = sum(w.nbytes for w in _weights([*layers_of(body.whole), *heads]))
    return size if size <= PREPACKED_AT_MOST else 0


def prepacked(module: nn.Module) -> nn.Module:
    """A view of the module with its linear layers prepacked. Those of other classes may compute otherwise, and stay."""
    if _is_linear(module):
        return _Prepacked(module)
    children = {name: prepacked(child) for name, child in module.named_children()}
    return view(module, children) if children else module


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D)


def _weights(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Of all linear layers in them, without adapters."""
    for module in modules:
        linear: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if _is_linear(linear):
            yield linear.weight
        else:
            yield from _weights(module.children())


class _Prepacked(nn.Module):
    def __init__(self, linear: Any) -> None:
        super().__init__()
        weight = linear.weight.detach()
        out_by_in = weight.T.contiguous() if isinstance(linear, Conv1D) else weight
        self.weight = torch.ops.mkldnn._reorder_linear_weight(out_by_in)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
