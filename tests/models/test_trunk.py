"""The start-up comparison: what it accepts, where it falls back, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, GraniteConfig

from ppolite.models.memory import kept_at, memory_of
from ppolite.models.sequences import Sequences
from ppolite.models.trunk import Trunk, checked_trunk, verify
from ppolite.types import UserError


def probe() -> list[list[int]]:
    prompts, responses = tiny.rows(shared=3)
    return [[*p, *r] for p, r in zip(prompts, responses, strict=True)]


@pytest.mark.parametrize("split", [0, 1, 3])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_family_passes(name: str, split: int) -> None:
    said: list[str] = []
    trunk = checked_trunk(tiny.model(name), split, probe(), said.append)
    assert (trunk.split, said) == (split, [])


def test_rows_of_one_token_do() -> None:
    assert verify(tiny.model(), 2, [[7]]) < 1e-5


class Embed(nn.Embedding):
    fresh = False

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        self.fresh = True
        return super().forward(input)


class Late(nn.Module):
    """A layer that wants the embedding to have run just before, in the same forward pass."""

    def __init__(self, layer: nn.Module, embed: Embed) -> None:
        super().__init__()
        self.layer = layer
        self._embed = [embed]

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        scale = 1.0 if self._embed[0].fresh else 1.5
        self._embed[0].fresh = False
        return self.layer(scale * hidden_states, *args, **kwargs)


def test_a_split_that_differs_falls_back_with_a_sentence() -> None:
    model = tiny.model("qwen3")
    decoder: Any = model.base_model
    embed = Embed(tiny.VOCAB, 16)
    embed.load_state_dict(decoder.embed_tokens.state_dict())
    decoder.embed_tokens = embed
    decoder.layers[3] = Late(decoder.layers[3], embed)
    said: list[str] = []
    trunk = checked_trunk(model, 2, probe(), said.append)
    assert trunk.split == 0
    assert len(said) == 1
    assert said[0].startswith("trunk.split: 2 changes Qwen3ForCausalLM's results by ")


def test_rows_end_to_end_that_differ_fall_back_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes a ready-made mask and adds its own idea of one."""
    model = tiny.model("llama")
    decoder: Any = model.base_model
    original = decoder.layers[2].forward

    def forward(hidden_states: Tensor, *args: object, attention_mask: Any = None, **kwargs: object) -> Tensor:
        if attention_mask is not None and attention_mask.shape[0] == 1:
            attention_mask = torch.ones_like(attention_mask).tril()
        return original(hidden_states, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(decoder.layers[2], "forward", forward)
    said: list[str] = []
    trunk = checked_trunk(model, 1, probe(), said.append)
    assert (trunk.split, trunk.packed) == (1, False)
    assert len(said) == 1
    assert said[0].startswith("rows that are laid end to end change LlamaForCausalLM's results by ")


def test_logits_that_are_scaled_are_refused() -> None:
    shape = GraniteConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        logits_scaling=3.0,
        bos_token_id=None,
        eos_token_id=tiny.END,
        pad_token_id=tiny.PAD,
    )
    model = tiny.fill(AutoModelForCausalLM.from_config(shape), 0)
    for split in (0, 2):
        with pytest.raises(UserError, match=r"GraniteForCausalLM: .* changed by \d\.\d+ by ppolite's way"):
            checked_trunk(model, split, probe(), pytest.fail)


def test_too_little_memory_is_no_changed_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's allocator of the CPU says it by a plain RuntimeError."""
    said = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to …"

    def verify(*_: Any, **__: Any) -> float:
        raise RuntimeError(said)

    monkeypatch.setattr("ppolite.models.trunk.verify", verify)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        checked_trunk(tiny.model("llama"), 2, probe(), pytest.fail)


def test_layers_that_cannot_be_passed_over_are_not_cut() -> None:
    """BLOOM's layers give a tuple, and its positions want a mask of rows and columns."""
    shape = BloomConfig(vocab_size=tiny.VOCAB, hidden_size=16, n_layer=4, n_head=2, eos_token_id=tiny.END)
    model = tiny.fill(AutoModelForCausalLM.from_config(shape), 0)
    said: list[str] = []
    trunk = checked_trunk(model, 2, probe(), said.append)
    assert (trunk.split, trunk.packed) == (0, False)
    assert len(said) == 1
    assert said[0].startswith("trunk.split: 2 changes BloomForCausalLM's results to an error (")


@pytest.mark.parametrize("split", [-1, tiny.LAYERS])
def test_a_split_outside_the_model(split: int) -> None:
    with pytest.raises(UserError, match=r"the model has layers 0\.\.3; choose one of those"):
        Trunk(tiny.model(), split)


def test_the_bottom_does_not_depend_on_the_budget() -> None:
    trunk = Trunk(tiny.model("gemma3"), 2)
    seqs = Sequences.of(*tiny.rows(shared=3), tiny.CPU)
    whole, parts = trunk.bottom(seqs), trunk.bottom(seqs, budget=1)
    assert whole.h_BTD is not None
    assert parts.h_BTD is not None
    assert whole.h_prefix_1PD is not None
    assert whole.h_BTD.shape == (*seqs.ids_BT.shape, 16)
    assert whole.h_prefix_1PD.shape == (1, 3, 16)
    assert not whole.h_BTD.requires_grad
    torch.testing.assert_close(whole.h_BTD[seqs.mask_BT], parts.h_BTD[seqs.mask_BT], rtol=1e-4, atol=1e-5)
    assert Trunk(tiny.model(), 0).bottom(seqs).h_BTD is None


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_wherever_it_is_kept_the_log_probs_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk, seqs = Trunk(tiny.model(name), 2), Sequences.of(*tiny.rows(shared=3), tiny.CPU)
    runs: list[int] = []
    run = Trunk._run_bottom

    def counted(self: Trunk, part: Sequences, front: Any) -> Tensor:
        runs.append(len(part))
        return run(self, part, front)

    monkeypatch.setattr(Trunk, "_run_bottom", counted)
    found: dict[str, Tensor] = {}
    often: dict[str, int] = {}
    for keep in ("device", "cpu", "none", "auto"):
        runs.clear()
        whole = trunk.bottom(seqs, keep=keep)  # type: ignore[arg-type]
        assert (whole.h_BTD is None) == (keep == "none")
        part = whole.select([2, 0])
        found[keep] = trunk.top.logprobs(part, 1.0)[0]
        trunk.top.logprobs(part, 1.0)  # another role asks
        whole.select([1]).hidden_BTD  # noqa: B018
        often[keep] = len(runs)
    assert often == {"device": 1, "cpu": 1, "none": 2, "auto": 1}
    for keep in ("cpu", "none", "auto"):
        torch.testing.assert_close(found[keep], found["device"], rtol=1e-4, atol=1e-5)


def test_too_large_to_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first place of which it fills at most a quarter."""
    everything, gpu = memory_of(tiny.CPU), torch.device("cuda")
    assert everything > 2**28
    monkeypatch.setattr("ppolite.models.memory.memory_of", lambda at: 4000 if at == gpu else everything)
    assert kept_at("auto", 1000, gpu) == "device"
    assert kept_at("auto", 1001, gpu) == "cpu"
    assert kept_at("auto", everything // 4 + 1, gpu) == "none"
    assert [kept_at(place, 2**60, gpu) for place in ("device", "cpu", "none")] == ["device", "cpu", "none"]
