"""Models are found and checked; what cannot be loaded gets one sentence."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from tests import tiny
from transformers import AutoModelForSequenceClassification

from ppolite.models import load
from ppolite.models.load import (
    compute_dtype,
    load_causal,
    load_classifier,
    load_reward,
    load_tokenizer,
    pick_device,
)
from ppolite.types import UserError


def refused(pattern: str, source: Path | str, loader: object = load_causal) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        loader(str(source), *([] if loader is load_tokenizer else [tiny.CPU]))  # type: ignore[operator]
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_comes_in_float32_and_frozen(folder: Path, tmp_path: Path) -> None:
    tiny.model("qwen3").bfloat16().save_pretrained(tmp_path / "half")
    model = load_causal(str(tmp_path / "half"), tiny.CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert load_tokenizer(str(folder)).pad_token == "<pad>"


def test_what_is_not_there(tmp_path: Path) -> None:
    refused("no such folder", tmp_path / "nowhere")
    refused("no such folder", "./nowhere")
    refused("no such file", tmp_path / "nowhere.gguf")
    refused("neither a folder here nor to be had from the hub", "nobody/nothing")
    refused("neither a folder here nor to be had from the hub", "nobody/nothing", load_tokenizer)
    (tmp_path / "empty").mkdir()
    refused(r"no \.safetensors weights", tmp_path / "empty")


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    for loader in (load_causal, load_reward):
        refused(r"pytorch_model\.bin is a pickle, which can run code", folder, loader)


def test_damage(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    refused("cannot be loaded", folder)
    (folder / "config.json").write_text("{")
    refused("cannot be loaded", folder)


def test_missing_weights_are_not_drawn_at_random(folder: Path, tmp_path: Path) -> None:
    refused(r"it lacks weights of LlamaForSequenceClassification \(score\.weight\)", folder, load_reward)
    tiny.classifier(tiny.model("qwen3")).save_pretrained(tmp_path / "reward")
    refused(r"it lacks weights of Qwen3ForCausalLM \(lm_head\.weight\)", tmp_path / "reward")


def test_a_classifier_with_two_outputs(tmp_path: Path) -> None:
    two = AutoModelForSequenceClassification.from_config(tiny.config("llama", num_labels=2))
    two.save_pretrained(tmp_path)
    refused("with one output named `score`", tmp_path, load_reward)


def test_a_foreign_classifier_has_no_units(tmp_path: Path) -> None:
    tiny.classifier(tiny.model()).save_pretrained(tmp_path)
    _, head, norm = load_reward(str(tmp_path), tiny.CPU)
    assert (norm.mean, norm.std, norm.offset) == (0.0, 1.0, 0.0)
    assert head.weight.shape == (1, 16)


def test_half_precision_leaves_rotary_frequencies_as_they_are(tmp_path: Path) -> None:
    tiny.classifier(tiny.model()).save_pretrained(tmp_path)
    half = load_classifier(str(tmp_path), tiny.CPU, torch.bfloat16)
    whole = load_classifier(str(tmp_path), tiny.CPU, torch.float32)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    frequencies = [(name, x) for name, x in half.named_buffers() if name.endswith("inv_freq")]
    assert frequencies
    for name, x in frequencies:
        assert torch.equal(x, whole.get_buffer(name))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == tiny.CPU
    with pytest.raises(UserError, match="torch sees no GPU here"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="another chip"
)
def test_the_chip_is_known() -> None:
    assert {"sse2", "fpu"} <= load._cpu()
    assert load._cpu() & {"GenuineIntel", "AuthenticAMD"}


def test_auto_dtype_asks_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    half, single = torch.bfloat16, torch.float32
    cpus = {
        "": single,
        "GenuineIntel avx2 fma": single,
        "GenuineIntel avx2 avx512_bf16": single,
        "GenuineIntel avx512_bf16 amx_bf16": half,
        "AuthenticAMD avx2": single,
        "AuthenticAMD avx2 avx512_bf16": half,
    }
    for words, expected in cpus.items():
        monkeypatch.setattr(load, "_cpu", lambda words=words: set(words.split()))
        assert compute_dtype("auto", tiny.CPU) == expected
    assert compute_dtype("bfloat16", tiny.CPU) == torch.bfloat16
    assert compute_dtype("float32", tiny.CPU) == torch.float32
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation, n=native: n)
        assert compute_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if native else torch.float32)
