"""Results as ordinary HF folders: a merged policy, a PEFT adapter, a sequence-classification reward model.

Weights are written as safetensors into a temporary folder that is renamed when complete. `load_policy` goes the
other way: a policy that is to be trained takes the trained weights of one that was saved.
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppolite.config.strict_json import loads
from ppolite.models.body import Body
from ppolite.models.decoder import decoder_of, layer_path, layers_of, wide
from ppolite.models.load import load_causal
from ppolite.models.roles import Norm, Roles, same_bottom
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


def adapter_weights(body: Body) -> dict[str, nn.Parameter]:
    """Both factors of each adapter, under the names that PEFT gives them in a file."""
    layers, _ = layer_path(body.decoder)
    stem = f"base_model.model.{body.decoder.base_model_prefix}.{layers}"
    weights: dict[str, nn.Parameter] = {}
    for name, module in body.layers.named_modules():
        if isinstance(module, BaseTunerLayer):
            index, _, rest = name.partition(".")
            tuned: Any = module
            for factor in ("lora_A", "lora_B"):
                place = f"{stem}.{int(index) + body.start}.{rest}.{factor}.weight"
                weights[place] = getattr(tuned, factor)["default"].weight
    return weights


def save_adapter(body: Body, config: LoraConfig | None, base: str, folder: Path) -> None:
    """A PEFT adapter for the model at `base`. Raises UserError when the run trained no adapter."""
    if config is None:
        raise UserError(
            f"{folder}: this run trained whole layers; only train.kind: lora has an adapter to save"
        )
    layers, _ = layer_path(body.decoder)
    state = {name: weight.detach().contiguous() for name, weight in adapter_weights(body).items()}
    out = copy.deepcopy(config)
    out.base_model_name_or_path = base
    out.task_type = "CAUSAL_LM"
    out.layers_to_transform = list(range(body.start, body.start + len(body.layers)))
    out.layers_pattern = layers
    out.inference_mode = True
    with replaced(folder) as draft:
        save_file(state, draft / "adapter_model.safetensors", metadata={"format": "pt"})
        out.save_pretrained(str(draft))


def classifier(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """The sequence classifier with one output of a model of this config, without memory.

    Raises UserError where transformers has no such class for the model.
    """
    config = copy.deepcopy(config)
    config.num_labels = 1
    auto: Any = AutoModelForSequenceClassification
    try:
        with torch.device("meta"):
            return auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UserError(
            f"reward model: transformers has no classifier for {config.model_type}; choose another model"
        ) from error


def save_reward(
    body: Body,
    norm: Norm,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    agreement: dict[str, Any],
    *,
    trust_remote_code: bool = False,
) -> None:
    """An `AutoModelForSequenceClassification` with one output, read at the last token; and `agreement.json`.

    HF's classifier heads have no bias, so what shifts the raw output stays beside the weights, as
    `ppolite_norm` in the config: score in people's units = raw + offset; reward = (score − mean) / std.
    Raises UserError where transformers has no such class for the model.
    """
    config = copy.deepcopy(body.decoder.config)
    config.pad_token_id = tokenizer.pad_token_id
    config.ppolite_norm = asdict(norm)
    model = classifier(config, trust_remote_code=trust_remote_code)
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


def load_policy(roles: Roles, source: str, *, trust_remote_code: bool = False) -> None:
    """Give the policy the trained weights that `save_policy` (or, for adapters, `save_adapter`) wrote at `source`.

    Frozen weights, the reference's among them, stay as they are. Raises UserError where those of `source` are
    others, so that the policy would not be the one that was saved.
    """
    adapters = (Path(source) / "adapter_config.json").exists()
    if adapters != (roles.lora is not None):
        kind, wanted = ("lora", "adapter") if roles.lora else ("layers or full", "policy")
        raise UserError(
            f"ppo.start {source}: with train.kind {kind} a run goes on from the folder `{wanted}` of an earlier"
            " one; name that"
        )
    given = _adapter_file(roles, source) if adapters else _policy_weights(roles, source, trust_remote_code)
    mine = adapter_weights(roles.policy) if adapters else roles.policy.trained_by_name()
    if {k: w.shape for k, w in given.items()} != {k: w.shape for k, w in mine.items()}:
        raise UserError(
            f"ppo.start {source}: it was trained in other layers or shapes than this run trains; give `trunk` and"
            " `train` as they were there"
        )
    with torch.no_grad():
        for name, weight in mine.items():
            weight.copy_(given[name])


def _policy_weights(roles: Roles, source: str, trust_remote_code: bool) -> dict[str, Tensor]:
    """Weights by their names in the policy's body, of those that it trains."""
    body, trunk = roles.policy, roles.trunk
    model = load_causal(source, body.device, trust_remote_code=trust_remote_code)
    frozen = {name: weight for name, weight in body.named_parameters() if not weight.requires_grad}
    if type(model) is type(trunk.model) and body.start < len(layers_of(decoder_of(model))):
        given = dict(Body.of(model, body.start).named_parameters())
        if same_bottom(trunk.model, model, trunk.split, trunk.dtype) and all(
            name in given and torch.equal(given[name].to(trunk.dtype), weight.to(trunk.dtype))
            for name, weight in frozen.items()
        ):
            return {name: weight for name, weight in given.items() if name not in frozen}
    raise UserError(
        f"ppo.start {source}: weights that this run keeps frozen differ from those of its SFT model; name a policy"
        " that was trained from the same one, with the same `trunk` and `train`"
    )


def _adapter_file(roles: Roles, source: str) -> dict[str, Tensor]:
    assert roles.lora is not None
    try:
        made = loads((Path(source) / "adapter_config.json").read_bytes())
        if not isinstance(made, dict):
            raise ValueError("adapter_config.json holds no object")
        given = load_file(Path(source) / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"ppo.start {source}: cannot be read ({error}); name another adapter") from error
    for key, mine in {"r": roles.lora.r, "lora_alpha": roles.lora.lora_alpha}.items():
        if made.get(key) != mine:
            raise UserError(
                f"ppo.start {source}: the adapter's {key} is {made.get(key)} and this run's {mine}; set train.lora_"
                f"{'rank' if key == 'r' else 'alpha'}: {made.get(key)}"
            )
    return given
