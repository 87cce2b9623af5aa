"""Bytes counted on tensors that are not there, beside those of tensors that are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny
from tests.models.test_recompute import Kept
from transformers import DynamicCache

from ppolite.config import Train
from ppolite.models.footprint import activations, blueprint, cache_size, size_of, weights_of
from ppolite.models.packs import LENGTH
from ppolite.models.roles import trainable
from ppolite.models.sequences import Sequences
from ppolite.models.slots import SlotCache
from ppolite.models.trunk import Trunk


@pytest.mark.parametrize("family", tiny.NAMES)
def test_weights_are_those_of_the_model(family: str) -> None:
    made = blueprint(tiny.config(family))
    real = {p.data_ptr(): p.nbytes for p in tiny.model(family).parameters()}
    assert size_of(weights_of([made, None, made.base_model])) == sum(real.values())
    assert all(p.is_meta for p in made.parameters())


@pytest.mark.parametrize(
    ("family", "kind", "dtype", "recompute"),
    [
        ("llama", "layers", torch.float32, False),
        ("llama", "layers", torch.bfloat16, False),
        ("llama", "layers", torch.float32, True),
        ("llama", "lora", torch.bfloat16, False),
        ("qwen3", "lora", torch.float32, True),
        ("gemma3", "layers", torch.bfloat16, True),
    ],
)
def test_activations_are_those_of_a_run(family: str, kind: Any, dtype: torch.dtype, recompute: bool) -> None:
    """Four layers and four packs, from what one and two layers and two and three packs have kept."""
    train, prefix, packs = Train(kind=kind, recompute=recompute), 5, 4
    trunk = Trunk(tiny.model(family), 0, dtype)
    body, _ = trainable(trunk.top, train, own=True)
    body.hold({})
    prompts = [[*[6] * prefix, 7 + i, *[8] * (LENGTH - 2)] for i in range(packs)]
    seqs = Sequences.of(prompts, [[9]] * packs, tiny.CPU)
    seqs.packed = trunk.packed
    with Kept(body) as found:
        hidden = body(seqs)
    assert hidden.requires_grad
    planned = activations(tiny.config(family), train, dtype, prefix).of(tiny.LAYERS, packs * LENGTH)
    assert planned == pytest.approx(found.bytes, rel=0.03)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_is_as_large_as_the_one_of_a_generation(family: str, dtype: torch.dtype) -> None:
    model: Any = tiny.model(family)
    prompts, rows, length = DynamicCache(), 3, 11
    with torch.no_grad():
        model(input_ids=torch.tensor([[6, 7]]), past_key_values=prompts, use_cache=True)
    cache = SlotCache(model.config, rows, length, dtype)
    cache.put([0], prompts, [0], [2])
    layers: Any = cache.layers
    assert sum(x.nbytes for layer in layers for x in (layer.keys, layer.values)) == rows * cache_size(
        model.config, length, dtype
    )
