"""Adapters without their wrappers: PEFT's numbers, nothing copied that need not be, nothing lost in rounding."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tests import tiny
from torch import nn

from ppolite.config import Train
from ppolite.models.body import Body
from ppolite.models.decoder import arithmetic, last_hidden, layers_of
from ppolite.models.plain import plain
from ppolite.models.roles import trainable
from ppolite.models.trunk import Trunk

IDS = torch.tensor([[7, 8, 9, 10, 11]])


def adapted(name: str, dtype: torch.dtype, size: float = 0.2) -> Body:
    trunk = Trunk(tiny.model(name), 2, dtype)
    body, _ = trainable(trunk.top, Train(kind="lora", lora_rank=2, lora_alpha=3.0))
    trunk.hold()
    body.hold({})
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in body.trained():
            p.copy_(size * torch.randn(p.shape, generator=stream))
    return body


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", tiny.NAMES)
@torch.no_grad()
def test_merged_is_peft_s_sum(name: str, on: bool) -> None:
    body = adapted(name, torch.float32)
    with body.adapters(on):
        decoder = plain(body)
        theirs = last_hidden(body.whole, input_ids=IDS)
        assert not any(isinstance(m, BaseTunerLayer) for m in decoder.modules())
    torch.testing.assert_close(last_hidden(decoder, input_ids=IDS), theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_adapted_weights_are_copied() -> None:
    body = adapted("llama", torch.float32)
    own = {p.data_ptr() for p in body.whole.parameters()}
    new = [name for name, p in plain(body).named_parameters() if p.data_ptr() not in own]
    linear = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    assert set(new) == {f"layers.{i}.{x}.weight" for i in (2, 3) for x in linear}
    with body.adapters(False):
        assert {p.data_ptr() for p in plain(body).parameters()} <= own


@pytest.mark.parametrize("kind", ["layers", "full"])
def test_without_adapters_nothing_is_copied(kind: str) -> None:
    trunk = Trunk(tiny.model(), 0 if kind == "full" else 2)
    body, _ = trainable(trunk.top, Train(kind=kind))  # type: ignore[arg-type]
    decoder = plain(body)
    assert [id(p) for p in decoder.parameters()] == [id(p) for p in body.whole.parameters()]
    assert all(a is b for a, b in zip(layers_of(decoder), layers_of(body.whole), strict=True))


@pytest.mark.parametrize("name", tiny.NAMES)
@torch.no_grad()
def test_half_precision_has_peft_s_numbers_to_the_bit(name: str) -> None:
    body = adapted(name, torch.bfloat16)
    with arithmetic(tiny.CPU, torch.bfloat16):
        theirs = last_hidden(body.whole, input_ids=IDS)
        assert torch.equal(last_hidden(plain(body), input_ids=IDS), theirs)
        with body.adapters(False):
            assert not torch.equal(last_hidden(plain(body), input_ids=IDS), theirs)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-3)])
@torch.no_grad()
def test_a_young_adapter_is_not_rounded_away(dtype: torch.dtype, rounding: float) -> None:
    """Weights ±1 that cancel, and an adapter that adds 0.001 to each of 256: 1.001 in bfloat16 is 1."""
    body = adapted("llama", dtype)
    layer = nn.ModuleDict({"linear": nn.Linear(256, 1, bias=False)})
    layer["linear"].weight.copy_(torch.tensor([1.0, -1.0]).repeat(128)[None])
    small = Body(body.decoder, 3, nn.ModuleList([layer]), body.norm, body.front, body.head, dtype=dtype)
    small.add_lora(1, 1.0)
    small.hold({})
    for p in small.layers.parameters():
        if p.requires_grad:
            p.fill_(0.001 if len(p) == 1 and p.shape[1] == 256 else 1.0)
    linear = layers_of(plain(small))[3]["linear"]
    with arithmetic(tiny.CPU, dtype):
        assert abs(float(linear(torch.ones(1, 256))) - 0.256) < rounding
