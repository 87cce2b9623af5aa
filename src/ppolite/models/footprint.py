"""What a model will need, in bytes, before there is one: its weights by name and shape, and what autograd keeps of it.

    model = blueprint(config)                    every module of it on torch's `meta` device: shapes without memory
    weights_of([model, body, …])                 each weight once, whoever shares it
    kept = activations(config, train, dtype, 20) of one layer, of one token: counted, not known by heart

What a layer keeps for its backward pass differs from family to family, with adapters, dtype and recomputing. So a model
of one layer and one of two are run on tensors that only pretend to be there (torch's FakeTensorMode, the one that
torch.compile traces with), and everything that autograd asks to be kept is added up. A run with real tensors keeps the
same to the byte (tests/models/test_footprint.py).

Left out: what an operation needs besides while it runs, and quadratic masks of rows far longer than a pack.

Axes: P tokens of the shared prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ppolite.config import Train
from ppolite.models.body import Body
from ppolite.models.packs import LENGTH
from ppolite.models.roles import trainable
from ppolite.models.sequences import Sequences
from ppolite.models.slots import windows
from ppolite.models.trunk import Trunk

_CPU = torch.device("cpu")


def blueprint(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal LM of this config in float32, frozen, without memory."""
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return model.requires_grad_(False).eval()


def weights_of(modules: Iterable[nn.Module | None]) -> list[nn.Parameter]:
    """All weights of these, each once."""
    found = {id(p): p for module in modules if module is not None for p in module.parameters()}
    return list(found.values())


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


def cache_size(config: PreTrainedConfig, length: int, dtype: torch.dtype) -> int:
    """Bytes of a row's keys and values in all layers (slots.py), when it has `length` tokens."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slots = sum(length if window is None else min(window, length) for window in windows(config))
    return 2 * slots * heads * width * min(dtype.itemsize, 4)


@dataclass(frozen=True)
class Activations:
    """What autograd keeps of a body, bytes."""

    layer: int
    """Of each layer, whatever the number of tokens: casts of weights, and the shared prefix."""
    layer_token: float
    """Of each layer and token."""
    token: float
    """Of each token, outside of the layers."""

    def of(self, layers: int, tokens: int) -> int:
        return round(layers * (self.layer + self.layer_token * tokens) + self.token * tokens)


def activations(
    config: PreTrainedConfig,
    train: Train,
    dtype: torch.dtype,
    prefix: int,
    *,
    trust_remote_code: bool = False,
) -> Activations:
    """Of a body of this config behind `prefix` shared tokens, by runs of one and two layers on two and three packs."""
    kept = {
        (n, rows): _kept(config, train, dtype, prefix, n, rows, trust_remote_code)
        for n in (1, 2)
        for rows in (2, 3)
    }
    two, three = (kept[2, rows] - kept[1, rows] for rows in (2, 3))
    outside = (kept[1, 3] - kept[1, 2]) - (three - two)
    return Activations(3 * two - 2 * three, (three - two) / LENGTH, outside / LENGTH)


def _kept(
    config: PreTrainedConfig,
    train: Train,
    dtype: torch.dtype,
    prefix: int,
    layers: int,
    rows: int,
    trust_remote_code: bool,
) -> int:
    small = copy.deepcopy(config)
    # The vocabulary is nobody's business here, and its special tokens would be outside of a small one.
    small.vocab_size, small.num_hidden_layers = 8, layers
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:layers]
    with torch.device("meta"):
        trunk = Trunk(blueprint(small, trust_remote_code=trust_remote_code), 0, dtype)
        kind = "lora" if train.kind == "lora" else "layers"  # an embedding keeps the ids
        body, _ = trainable(trunk.top, train.model_copy(update={"kind": kind}), own=True)
        body.hold({})
    # Rows that differ in the first token behind the prefix, each as long as a pack.
    prompts = [[*[0] * prefix, 1 + i, *[0] * (LENGTH - 2)] for i in range(rows)]
    seqs = Sequences.of(prompts, [[0]] * rows, _CPU)
    seqs.packed = trunk.packed
    if seqs.packed:
        _ = seqs.packs  # asks how long rows are, which a pretended tensor cannot tell
    with FakeTensorMode(allow_non_fake_inputs=True):
        _pretend(body.whole)
        _pretend(body)
        keeper = _Keeper(body)
        with keeper:
            hidden = body(seqs)
    del hidden
    return keeper.bytes


def _pretend(module: nn.Module) -> None:
    """Weights and buffers on the CPU, as far as FakeTensorMode goes; ties are kept."""
    made: dict[int, Any] = {}
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, x in store.items():
                if x is not None and x.is_meta and not hasattr(x, "fake_mode"):
                    made.setdefault(id(x), _like(x))
                    store[name] = made[id(x)]


def _like(x: Tensor) -> Tensor:
    empty = torch.empty(x.shape, dtype=x.dtype)
    return nn.Parameter(empty, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else empty


class _Keeper(torch.autograd.graph.saved_tensors_hooks):
    """Adds up what is kept for the backward pass and is no weight, each piece of memory once."""

    def __init__(self, body: Body) -> None:
        weights = {p.untyped_storage()._cdata for p in body.parameters()}
        self._found: dict[int, torch.UntypedStorage] = {}

        def pack(x: Tensor) -> Tensor:
            memory = x.untyped_storage()
            if memory._cdata not in weights:
                self._found[memory._cdata] = memory
            return x.detach()

        super().__init__(pack, lambda x: x)

    @property
    def bytes(self) -> int:
        return sum(memory.nbytes() for memory in self._found.values())
