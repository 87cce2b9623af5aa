"""Weights laid out for a few rows: the same numbers, for a generation on a CPU and nothing else."""

from __future__ import annotations

import pytest
import torch
from tests import tiny
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ppolite.config import Train
from ppolite.models import prepacked as module
from ppolite.models.body import Body
from ppolite.models.decoder import arithmetic, last_hidden, layers_of
from ppolite.models.plain import plain
from ppolite.models.prepacked import prepacked, prepacking
from ppolite.models.roles import trainable
from ppolite.models.trunk import Trunk
from ppolite.rollout import local
from ppolite.rollout.local import LocalGenerator
from ppolite.types import Prompt, Sampling

IDS = torch.tensor([[7, 8, 9, 10, 11], [3, 1, 4, 1, 5]])

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN for this machine"
)


@pytest.fixture(autouse=True)
def on_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float32 gains by a copy."""
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def body_of(name: str = "llama", kind: str = "lora", dtype: torch.dtype = torch.float32) -> Body:
    body, _ = trainable(Trunk(tiny.model(name), 2, dtype).top, Train(kind=kind))  # type: ignore[arg-type]
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in body.trained():
            p.add_(0.1 * torch.randn(p.shape, generator=stream))
    return body


@pytest.mark.parametrize("linear", [nn.Linear(48, 80), nn.Linear(48, 80, bias=False), Conv1D(80, 48)])
@pytest.mark.parametrize("rows", [1, 3, 17, 300])
@torch.no_grad()
def test_the_same_product(linear: nn.Module, rows: int) -> None:
    stream = torch.Generator().manual_seed(rows)
    for x in (torch.randn(rows, 48, generator=stream), torch.randn(2, rows, 48, generator=stream)):
        ours = prepacked(linear, torch.float32)(x)
        torch.testing.assert_close(ours, linear(x), rtol=1e-5, atol=1e-5)
        assert ours.is_contiguous()


@pytest.mark.parametrize("kind", ["lora", "layers"])
@pytest.mark.parametrize("name", tiny.NAMES)
@torch.no_grad()
def test_a_body_s_numbers(name: str, kind: str) -> None:
    body = body_of(name, kind)
    hidden_BTD = last_hidden(body.whole, input_ids=IDS)
    decoder = plain(body, prepack=True)
    torch.testing.assert_close(last_hidden(decoder, input_ids=IDS), hidden_BTD, rtol=1e-4, atol=1e-5)
    last_BD, head = hidden_BTD[:, -1], prepacked(body.head, body.dtype)
    torch.testing.assert_close(body.logits(last_BD, head=head), body.logits(last_BD), rtol=1e-4, atol=1e-4)
    assert not any(type(m) in (nn.Linear, Conv1D) for m in layers_of(decoder).modules())


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 for this machine"
)
@pytest.mark.parametrize("kind", ["lora", "layers"])
@pytest.mark.parametrize("name", tiny.NAMES)
@torch.no_grad()
def test_a_body_s_numbers_in_half_precision(name: str, kind: str) -> None:
    """Those of oneDNN, which the linear layers ask too: to the bit."""
    body = body_of(name, kind, torch.bfloat16)
    with arithmetic(tiny.CPU, torch.bfloat16):
        hidden_BTD = last_hidden(plain(body), input_ids=IDS)
        assert torch.equal(last_hidden(plain(body, prepack=True), input_ids=IDS), hidden_BTD)
    last_BD, head = hidden_BTD[:, -1], prepacked(body.head, body.dtype)
    assert torch.equal(body.logits(last_BD, head=head), body.logits(last_BD))


@torch.no_grad()
def test_weights_are_those_of_the_call() -> None:
    body = body_of(kind="layers")
    before = last_hidden(plain(body, prepack=True), input_ids=IDS)
    for p in body.trained():
        p.mul_(1.5)
    after = last_hidden(plain(body, prepack=True), input_ids=IDS)
    torch.testing.assert_close(after, last_hidden(body.whole, input_ids=IDS), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-2)


def test_a_class_of_its_own_is_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().forward(input)

    own = nn.Sequential(Doubled(4, 4))
    assert prepacked(own, torch.float32)(torch.ones(1, 4)).equal(own(torch.ones(1, 4)))


def test_where_there_is_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    body = body_of()
    size = prepacking(body, tiny.CPU)
    assert prepacking(body, torch.device("cuda")) == 0
    for half in (size // 2, 0):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda half=half: half > 0)
        assert prepacking(body_of(dtype=torch.bfloat16), tiny.CPU) == half
    for capability in ("AVX512", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda has=capability: has)
        assert prepacking(body, tiny.CPU) == 0
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(module, "PREPACKED_AT_MOST", size)
    assert prepacking(body, tiny.CPU) == size
    monkeypatch.setattr(module, "PREPACKED_AT_MOST", size - 1)
    assert prepacking(body, tiny.CPU) == 0


@pytest.mark.parametrize(
    ("count", "dtype", "copies"), [(2, torch.float32, 1), (1, torch.float32, 0), (2, torch.float64, 0)]
)
def test_a_generation_makes_one_copy(
    count: int, dtype: torch.dtype, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the head, that is, which stands for all; of a single row there is none to gain."""
    made: list[object] = []
    monkeypatch.setattr(
        local, "prepacked", lambda head, dtype: made.append(head) or module.prepacked(head, dtype)
    )
    body = Body.of(tiny.model().to(dtype), 0, dtype=dtype)
    generator = LocalGenerator(body, tiny.tokenizer(), frozenset([2]))
    generator.generate([Prompt(text=f"say {i}") for i in range(count)], Sampling(max_new_tokens=3), seed=0)
    assert made == [body.head] * copies


@pytest.mark.parametrize("kind", ["lora", "layers"])
def test_its_size_is_that_of_all_linear_weights(kind: str) -> None:
    body = body_of(kind=kind)
    weights = [
        m.weight
        for name, m in [*layers_of(body.whole).named_modules(), ("head", body.head)]
        if type(m) is nn.Linear and "lora_" not in name
    ]
    assert prepacking(body, tiny.CPU) == 4 * sum(w.numel() for w in weights)
