"""Adapters without their wrappers: PEFT's numbers, nothing copied that need not be, nothing lost in rounding."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tests import tiny
from torch import Tensor, nn

from ppolite.config import Train
from ppolite.models.body import Body, arithmetic, last_hidden, layers_of
from ppolite.models.plain import THIN_ROWS, _Thin, _thin, plain
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


@pytest.mark.parametrize("rows", [1, 8, THIN_ROWS, THIN_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_few_rows_are_multiplied_in_the_other_order(bias: bool, rows: int) -> None:
    """The same numbers but for rounding, laid out as `nn.Linear` does; in its own order where there are many rows."""
    linear = nn.Linear(48, 80, bias=bias)
    thin = _thin(nn.ModuleDict({"linear": linear}))["linear"]  # type: ignore[index]
    assert thin is not linear
    assert thin.weight is linear.weight
    stream = torch.Generator().manual_seed(0)
    for x in (torch.randn(rows, 48, generator=stream), torch.randn(rows, 1, 48, generator=stream)):
        ours, theirs = thin(x), linear(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert ours.is_contiguous()
    other = mock.patch.object(nn.Linear, "forward", side_effect=AssertionError)
    with other if rows <= THIN_ROWS else nullcontext():
        thin(x)


def test_linear_layers_of_another_class_are_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().forward(input)

    module = nn.ModuleDict({"scaled": Scaled(4, 4)})
    assert _thin(module)["scaled"](torch.ones(1, 4)).equal(module["scaled"](torch.ones(1, 4)))  # type: ignore[index]


@pytest.mark.parametrize(("dtype", "thin"), [(torch.float32, True), (torch.bfloat16, False)])
def test_only_float32_takes_the_other_order(dtype: torch.dtype, thin: bool) -> None:
    kinds = {type(m) for m in layers_of(plain(adapted("llama", dtype))).modules()}
    assert (_Thin in kinds) == (thin and torch.backends.mkl.is_available())


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
