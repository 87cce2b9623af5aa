"""What is saved, plain transformers and PEFT load, and they compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppolite.models.body import Body
from ppolite.models.export import replaced, save_adapter, save_policy, save_reward
from ppolite.models.load import load_causal, load_reward
from ppolite.models.roles import Norm, trainable
from ppolite.models.sequences import Sequences
from ppolite.models.trunk import Trunk
from ppolite.types import UserError

KINDS = [("lora", 2), ("lora", 0), ("layers", 1), ("full", 0)]


def stir(body: Body) -> None:
    """As if trained: every trained weight is elsewhere."""
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in body.trained():
            p.add_(0.2 * torch.randn(p.shape, generator=stream))


def trained(name: str, kind: str, split: int) -> tuple[Any, Trunk, Body, Any]:
    torch.manual_seed(0)  # an adapter starts from torch's global stream
    model = tiny.model(name)
    trunk = Trunk(model, split)
    body, lora = trainable(trunk.top, tiny.train(kind, lora_alpha=3.0))
    stir(body)
    return model, trunk, body, lora


def check_logprobs(trunk: Trunk, body: Body, plain: Any) -> None:
    prompts, responses = tiny.rows(shared=3)
    with torch.no_grad():
        seqs = trunk.bottom(Sequences.of(prompts, responses, tiny.CPU))
        ours_BR, _ = body.logprobs(seqs, 1.0)
        moved = []
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
            torch.testing.assert_close(ours_BR[i, : len(r)], tiny.logprobs(plain, p, r), rtol=1e-5, atol=2e-5)
            moved += (ours_BR[i, : len(r)] - tiny.logprobs(tiny_start(plain), p, r)).abs().tolist()
        assert max(moved) > 1e-2


def tiny_start(plain: Any) -> Any:
    """The model before training."""
    return tiny.model(next(n for n in tiny.NAMES if tiny.config(n).model_type == plain.config.model_type))


@pytest.mark.parametrize(("kind", "split"), KINDS)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_policy_loads_in_plain_transformers(tmp_path: Path, name: str, kind: str, split: int) -> None:
    model, trunk, body, _ = trained(name, kind, split)
    folder = tmp_path / "policy"
    save_policy(model, body, tiny.tokenizer(), folder)
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert plain.dtype == torch.float32
    assert plain.config.tie_word_embeddings == model.config.tie_word_embeddings
    check_logprobs(trunk, body, plain)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny.tokenizer().chat_template
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    load_causal(str(folder), tiny.CPU)


# PEFT reads a property that transformers 5 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("split", [0, 2])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_an_adapter_loads_in_peft(tmp_path: Path, name: str, split: int) -> None:
    sft = tmp_path / "sft"
    tiny.model(name).save_pretrained(sft)
    _, trunk, body, lora = trained(name, "lora", split)
    save_adapter(body, lora, str(sft), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(sft)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert len(list((tmp_path / "adapter").glob("*.safetensors"))) == 1
    assert not list((tmp_path / "adapter").glob("*.bin"))
    check_logprobs(trunk, body, plain)


def test_whole_layers_have_no_adapter(tmp_path: Path) -> None:
    _, _, body, lora = trained("llama", "layers", 2)
    with pytest.raises(UserError, match=r"only train\.kind: lora has an adapter"):
        save_adapter(body, lora, "sft", tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "split"), [("lora", 2), ("layers", 2), ("full", 0)])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_reward_model_is_a_classifier(tmp_path: Path, name: str, kind: str, split: int) -> None:
    """Equal raw scores on a right-padded batch, and the units come back."""
    trunk = Trunk(tiny.model(name), split)
    score = nn.Linear(16, 1, bias=False)
    body, _ = trainable(trunk.top.clone(score=score), tiny.train(kind))
    stir(body)
    norm, folder = Norm(0.5, 2.0, -0.25), tmp_path / "reward"
    save_reward(body, norm, tiny.tokenizer(), folder, {"pair_accuracy": 0.9})
    prompts, responses = tiny.rows(shared=2)
    plain, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    texts = [tiny.words([*p, *r]) for p, r in zip(prompts, responses, strict=True)]
    # Not the saved one: AutoTokenizer takes any tokenizer beside a Qwen2 config for Qwen2's BPE.
    batch = tiny.tokenizer()(texts, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        ours_B = body.scores(trunk.bottom(Sequences.of(prompts, responses, tiny.CPU)))
        theirs_B1 = plain.eval()(**batch).logits
    torch.testing.assert_close(ours_B, theirs_B1[:, 0], rtol=1e-4, atol=1e-5)
    model, head, loaded = load_reward(str(folder), tiny.CPU)
    assert loaded == norm
    again_B = Body.of(model, 0, score=head).scores(Sequences.of(prompts, responses, tiny.CPU))
    torch.testing.assert_close(again_B, ours_B.detach(), rtol=1e-4, atol=1e-5)
    assert '"pair_accuracy": 0.9' in (folder / "agreement.json").read_text()


class Broken:
    def save_pretrained(self, folder: Path) -> None:
        raise OSError("disk full")


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    model, _, body, _ = trained("llama", "layers", 2)
    broken: Any = Broken()
    with pytest.raises(OSError, match="disk full"):
        save_policy(model, body, broken, tmp_path / "policy")
    assert not list(tmp_path.iterdir())
    save_policy(model, body, tiny.tokenizer(), tmp_path / "policy")
    files = sorted(p.name for p in (tmp_path / "policy").iterdir())
    with pytest.raises(OSError, match="disk full"):
        save_policy(model, body, broken, tmp_path / "policy")
    assert sorted(p.name for p in (tmp_path / "policy").iterdir()) == files
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_replaced_replaces(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with replaced(tmp_path / "deep" / "folder") as draft:
            (draft / content).write_text(content)
    assert [p.name for p in (tmp_path / "deep" / "folder").iterdir()] == ["two"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["folder"]
