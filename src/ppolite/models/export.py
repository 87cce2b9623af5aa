"""Results as ordinary HF folders: a merged policy, a PEFT adapter, a sequence-classification reward model.

Weights are written as safetensors into a temporary folder that is renamed when complete.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ppolite.models.body import Body, layer_path, wide
from ppolite.models.roles import Norm
from ppolite.types import UserError


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Write beside `folder`, then put the result in its place; after an error the old one is still there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def merged_layers(body: Body) -> nn.ModuleList:
    """The body's layers as plain modules: adapters added into a copy of the weights."""
    if not any(isinstance(m, BaseTunerLayer) for m in body.layers.modules()):
        return body.layers
    layers = copy.deepcopy(body.layers)
    for weight in layers.parameters():
        weight.data = wide(weight.data)  # added in bfloat16, most of an adapter would be lost
    for name, module in list(layers.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            module.merge()
            setattr(layers.get_submodule(parent), leaf, module.get_base_layer())
    return layers


def decoder_state(body: Body) -> dict[str, Tensor]:
    """State dict of the whole decoder: the shared bottom, this body on top."""
    layers, norm = layer_path(body.decoder)
    own: dict[str, nn.Module] = {norm: body.norm, **dict(body.front.items())}
    own |= {f"{layers}.{body.start + i}": layer for i, layer in enumerate(merged_layers(body))}
    # Left out, not overwritten: adapters put on in place have given the old weights other names.
    taken = tuple(f"{name}." for name in own)
    state = {k: v for k, v in body.decoder.state_dict().items() if not k.startswith(taken)}
    for name, module in own.items():
        state |= _under(name, module.state_dict())
    return state


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": wide(value.detach()).contiguous() for key, value in state.items()}


def save_policy(model: PreTrainedModel, body: Body, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A causal LM that plain `transformers` loads; `model` gives the frame, `body` the trained weights."""
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    assert body.head is not None
    state = _under(model.base_model_prefix, decoder_state(body)) | _under(head, body.head.state_dict())
    with replaced(folder) as draft:
        model.save_pretrained(draft, state_dict=state)
        tokenizer.save_pretrained(draft)


def save_adapter(body: Body, config: LoraConfig | None, base: str, folder: Path) -> None:
    """A PEFT adapter for the model at `base`. Raises UserError when the run trained no adapter."""
    if config is None:
        raise UserError(
            "--adapter: this run trained whole layers; only train.kind: lora has an adapter to save"
        )
    layers, _ = layer_path(body.decoder)
    stem = f"base_model.model.{body.decoder.base_model_prefix}.{layers}"
    state: dict[str, Tensor] = {}
    for name, module in body.layers.named_modules():
        if isinstance(module, BaseTunerLayer):
            index, _, rest = name.partition(".")
            tuned: Any = module
            for factor in ("lora_A", "lora_B"):
                weight = getattr(tuned, factor)["default"].weight.detach().contiguous()
                state[f"{stem}.{int(index) + body.start}.{rest}.{factor}.weight"] = weight
    out = copy.deepcopy(config)
    out.base_model_name_or_path = base
    out.task_type = "CAUSAL_LM"
    out.layers_to_transform = list(range(body.start, body.start + len(body.layers)))
    out.layers_pattern = layers
    out.inference_mode = True
    with replaced(folder) as draft:
        save_file(state, draft / "adapter_model.safetensors", metadata={"format": "pt"})
        out.save_pretrained(str(draft))


def save_reward(
    body: Body, norm: Norm, tokenizer: PreTrainedTokenizerBase, folder: Path, agreement: dict[str, Any]
) -> None:
    """An `AutoModelForSequenceClassification` with one output, read at the last token; and `agreement.json`.

    HF's classifier heads have no bias, so what shifts the raw output stays beside the weights, as
    `ppolite_norm` in the config: score in people's units = raw + offset; reward = (score − mean) / std.
    Raises UserError where transformers has no such class for the model.
    """
    config = copy.deepcopy(body.decoder.config)
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id
    config.ppolite_norm = asdict(norm)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError:
        raise UserError(
            f"reward model: transformers has no classifier for {config.model_type}; choose another model"
        ) from None
    assert body.score is not None
    weights = {"weight": body.score.weight}
    state = _under(model.base_model_prefix, decoder_state(body)) | _under("score", weights)
    if differing := set(model.state_dict()) ^ set(state):
        raise UserError(
            f"reward model: {type(model).__name__} has other weights ({sorted(differing)[0]}, …); choose"
            " another model"
        )
    with replaced(folder) as draft:
        model.save_pretrained(draft, state_dict=state)
        tokenizer.save_pretrained(draft)
        (draft / "agreement.json").write_text(json.dumps(agreement, indent=1) + "\n", encoding="utf-8")
