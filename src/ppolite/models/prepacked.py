"""Linear layers whose weights are laid out beforehand for products of a few rows.

    size = prepacking(body, device)      # bytes of such a copy; 0 where a generation makes none
    layer = prepacked(layer, dtype)      # a view of it, each linear layer with a copy of its weight

A decoded token's products have as many rows as there are answers. For so few, those of `nn.Linear` are far from the
chip's ceiling: MKL's in float32, and oneDNN's in bfloat16, which lay the weight out anew each time. oneDNN's with a
weight that was laid out for them are nearer. Microseconds on two cores:

                        576 × 1,536, 4 rows     17 rows        head of the 135M model, 32 rows
    float32, AVX2       729 → 320               1,220 → 647    84,000 → 29,000
    float32, AVX512      63 →  69                 305 → 143    11,200 →  8,900
    bfloat16, AVX512    108 →  69                 254 → 212    13,800 → 11,400

To lay out all weights takes a third of a second at most. So on a CPU a generation makes such a copy and drops it at its
end. In float32 rounding is all that changes, in bfloat16 nothing. In float32 with AVX512 none is made: answers of the
film critic came in 1 / 1.10 of the time, and its peak of memory was a sixth higher (docs/performance.md).
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

    0 on a GPU, where this machine gains little by one, and where they were more than `PREPACKED_AT_MOST`.
    """
    if device.type != "cpu" or not _gains(body.dtype):
        return 0
    heads = [] if body.head is None else [body.head]
    size = body.dtype.itemsize * sum(w.numel() for w in _weights([*layers_of(body.whole), *heads]))
    return size if size <= PREPACKED_AT_MOST else 0


def _gains(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"


def prepacked(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A view of the module with its linear layers prepacked, to be multiplied in `dtype`.

    Those of other classes may compute otherwise, and stay.
    """
    if _is_linear(module):
        return _Prepacked(module, dtype)
    children = {name: prepacked(child, dtype) for name, child in module.named_children()}
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
    def __init__(self, linear: Any, dtype: torch.dtype) -> None:
        super().__init__()
        weight = linear.weight.detach().to(dtype)
        out_by_in = weight.T.contiguous() if isinstance(linear, Conv1D) else weight
        self.weight = torch.ops.mkldnn._reorder_linear_weight(out_by_in)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)  # what autocast does for a linear layer
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
