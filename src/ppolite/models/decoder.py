"""A decoder of transformers seen as parts: where its layers are, views with some of them exchanged, how it is run.

    layer_path()    finds layer list and final norm among the decoder's children
    front_of()      the rest: embeddings, positions
    view()          the same module with other children; parameters are shared
    hold()          frozen weights in half precision; arithmetic() and last_hidden() run it

Left out: encoder-decoders, models whose layers are not one list, and tensor parallelism.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ppolite.types import UserError

M = TypeVar("M", bound=nn.Module)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head."""
    return cast("PreTrainedModel", model.base_model)


def layer_path(decoder: PreTrainedModel) -> tuple[str, str]:
    """Names of the layer list and of the final norm among the decoder's direct children.

    Raises UserError for a decoder that is built otherwise.
    """
    children = dict(decoder.named_children())
    names = list(children)
    count = getattr(decoder.config, "num_hidden_layers", None)
    lists = [n for n, m in children.items() if isinstance(m, nn.ModuleList) and len(m) == count]
    after = names[names.index(lists[0]) + 1 :] if len(lists) == 1 else []
    norms = [n for n in after if "norm" in n or n == "ln_f"]
    if len(norms) != 1 or decoder.get_input_embeddings() not in children.values():
        raise UserError(
            f"{type(decoder).__name__}: cannot find its layer list, final norm and embedding; ppolite needs a"
            " decoder-only model of the usual build (Llama, Qwen, Gemma, GPT-2, GPT-NeoX …)"
        )
    return lists[0], norms[0]


def layers_of(decoder: PreTrainedModel) -> nn.ModuleList:
    return getattr(decoder, layer_path(decoder)[0])


def front_of(decoder: PreTrainedModel) -> nn.ModuleDict:
    """All that runs before layer 0: embedding, learned positions, rotary tables."""
    others = layer_path(decoder)
    return nn.ModuleDict({n: m for n, m in decoder.named_children() if n not in others})


def view(module: M, children: dict[str, Any]) -> M:
    """The same module with some children exchanged; parameters are shared, nothing is copied."""
    other = copy.copy(module)
    other.__dict__ = dict(module.__dict__)
    other._modules = {**module._modules, **children}
    return other


def arithmetic(device: torch.device, dtype: torch.dtype) -> Any:
    """Autocast to a half-precision `dtype`; the weights stay as they are."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype.itemsize < 4)


def hold(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen linear weights in the half-precision `dtype` that they are multiplied in.

    Autocast gives the same numbers, but casts a frozen weight anew at every call: on a 135M model that is most
    of the time of a decoded token. Trained weights stay as they are, and so do norms and embeddings.
    """
    if dtype.itemsize < 4:
        for part in module.modules():
            if isinstance(part, (nn.Linear, Conv1D)) and not part.weight.requires_grad:
                part.to(dtype)


def last_hidden(decoder: PreTrainedModel, **kwargs: Any) -> Tensor:
    """Hidden states after the final norm, [B, T, D]."""
    return decoder(**kwargs).last_hidden_state


def wide(x: Tensor) -> Tensor:
    """At least float32; integers stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x
