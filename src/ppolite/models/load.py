"""Models from a folder, a hub id or a .gguf file. Nothing is unpickled, and no foreign code runs unasked.

`load_causal` and `load_reward` return float32 weights on the device, frozen, without dropout. What arithmetic
they are run in is `compute_dtype`'s answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppolite.models.roles import Norm
from ppolite.types import UserError


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU when there is one. Raises UserError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but torch sees no GPU here; set device: auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the chip multiplies it natively; other CPUs emulate it, slowly."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    features = _cpu_flags()
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16"} & features else torch.float32


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def _source(source: str) -> tuple[str, dict[str, Any]]:
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model {source}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            pickled = [p.name for p in [*path.glob("*.bin"), *path.glob("*.pt")]]
            if pickled:
                raise UserError(
                    f"model {source}: {pickled[0]} is a pickle, which can run code; convert it to safetensors"
                )
            raise UserError(f"model {source}: the folder holds no .safetensors weights")
        return str(path), {}
    if path.is_absolute() or source.startswith("."):
        raise UserError(f"model {source}: no such folder")
    return source, {}


def _pretrained(auto: Any, source: str, trust_remote_code: bool, **more: Any) -> Any:
    name, kwargs = _source(source)
    try:
        return auto.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs, **more)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise UserError(
                f"model {source}: neither a folder here nor to be had from the hub; check name and network"
            ) from error
        if not trust_remote_code and "custom code" in str(error):
            raise UserError(
                f"model {source}: it brings Python of its own; read it, then set trust_remote_code: true"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model {source}: cannot be loaded ({reason})") from error


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with a model, as it is; `data.chat.prepare_tokenizer` repairs it."""
    return _pretrained(AutoTokenizer, source, trust_remote_code)


def _model(auto: Any, source: str, device: torch.device, trust_remote_code: bool) -> PreTrainedModel:
    gguf = source.endswith(".gguf")
    kind = {"quantization_config": GgufConfig(dequantize=True)} if gguf else {"use_safetensors": True}
    model, info = _pretrained(
        auto, source, trust_remote_code, dtype=torch.float32, output_loading_info=True, **kind
    )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model {source}: it lacks weights of {type(model).__name__} ({', '.join(missing[:3])}): it is a"
            " part of a model or another kind of one; choose a complete one"
        )
    return model.to(device).requires_grad_(False).eval()


def load_causal(source: str, device: torch.device, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model in float32.

    Raises UserError when there is none, when its weights are pickled, or when some are missing: transformers
    would draw those at random.
    """
    return _model(AutoModelForCausalLM, source, device, trust_remote_code)


def load_classifier(
    source: str, device: torch.device, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A sequence classifier, whatever its head and its number of labels, held in `dtype`. Raises as `load_causal`."""
    model: Any = _model(AutoModelForSequenceClassification, source, device, trust_remote_code)
    return model.to(dtype)


def load_reward(
    source: str, device: torch.device, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, nn.Linear, Norm]:
    """A sequence classifier with one output: model, its score head, and its units.

    A classifier that ppolite did not make has none: mean 0, standard deviation 1, no offset. Raises UserError
    as `load_causal` does, and for a classifier with more outputs.
    """
    model = _model(AutoModelForSequenceClassification, source, device, trust_remote_code)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise UserError(
            f"reward model {source}: expected a sequence classifier with one output named `score`"
        )
    return model, head, Norm(**(getattr(model.config, "ppolite_norm", None) or {}))
