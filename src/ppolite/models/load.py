"""Models from a folder, a hub id or a .gguf file. Nothing is unpickled, and no foreign code runs unasked.

`load_causal` and `load_reward` return float32 weights on the device, frozen, without dropout. What arithmetic
they are run in is `compute_dtype`'s answer.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppolite.config import at_home
from ppolite.models.roles import Norm
from ppolite.types import UserError

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
"""Endings of weights that torch pickles."""


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU when there is one. Raises UserError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but torch sees no GPU here; set device: auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the chip multiplies it faster than float32, which not all do that can (docs/log.md).

    Of CPUs: those with AMX, and AMD's with AVX512-BF16. Intel's AVX512-BF16 has half the rate of its float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    chip = _cpu()
    fast = "amx_bf16" in chip or {"AuthenticAMD", "avx512_bf16"} <= chip
    return torch.bfloat16 if fast else torch.float32


def _cpu() -> set[str]:
    """Vendor and features of the first core, as Linux names them; empty where it does not."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    first = info.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    rows = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    told = {key.strip(): value.split() for key, value in rows}
    return {word for key in ("vendor_id", "flags") for word in told.get(key, ())}


def _source(source: str, kind: str) -> tuple[str, dict[str, Any]]:
    path = at_home(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model {source}: no such file; look at its path")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            raise UserError(
                f"model {source}: an adapter, or a model with one in it; merge it into its model and name the result. "
                + _merging(source, kind)
            )
        if not any(path.glob("*.safetensors")):
            if pickled := _pickles(path):
                raise UserError(f"model {source}: {_about_pickle(pickled[0], kind)}")
            raise UserError(f"model {source}: the folder holds no .safetensors weights; name another")
        return str(path), {}
    if path.suffix in PICKLES and path.is_file():
        raise UserError(f"model {source}: {_about_pickle(path, kind)}")
    if path.is_file():
        raise UserError(f"model {source}: a file; name a folder in HF format, a .gguf file or a hub id")
    if path.is_absolute() or source.startswith("."):
        raise UserError(f"model {source}: no such folder; look at its path")
    return source, {}


def _pickles(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
    return [p for p in found if p.name.startswith("pytorch_model")] or found


def _about_pickle(path: Path, kind: str) -> str:
    """Why it is not opened, and a command for those who trust it. Nothing of ours unpickles, so it is not ours."""
    if path.name.startswith("pytorch_model"):
        here = json.dumps(str(path.parent), ensure_ascii=False)
        code = (
            f"from transformers import {kind} as M; m = M.from_pretrained({here}); m.save_pretrained({here})"
        )
    else:
        here, target = (
            json.dumps(str(p), ensure_ascii=False) for p in (path, path.with_name("model.safetensors"))
        )
        code = (
            "import torch; from safetensors.torch import save_file as s; "
            f't = torch.load({here}, "cpu", weights_only=True); '
            f"s({{k: v.clone() for k, v in t.items()}}, {target})"
        )
    return (
        f"{path.name} is a pickle, which can run code when it is opened, so it is not. If you trust who made it, this "
        "command, which needs no network, has torch read the weights in it and nothing else, and writes them beside "
        f"it as model.safetensors: {shlex.join(['python', '-c', code])}"
    )


def _merging(source: str, kind: str) -> str:
    auto = (
        "AutoPeftModelForCausalLM" if kind != "AutoModelForSequenceClassification" else f"AutoPeft{kind[4:]}"
    )
    here, target = (json.dumps(p, ensure_ascii=False) for p in (source, f"{source.rstrip('/')}-merged"))
    code = (
        f"from peft import {auto} as M; m = M.from_pretrained({here}).merge_and_unload(); "
        f"m.save_pretrained({target})"
    )
    return f"This command does it: {shlex.join(['python', '-c', code])}"


def _pretrained(auto: Any, source: str, trust_remote_code: bool, **more: Any) -> Any:
    name, kwargs = _source(source, auto.__name__)
    try:
        return auto.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs, **more)
    except Exception as error:  # it raises whatever a broken file makes it stumble over
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise UserError(
                f"model {source}: neither a folder here nor to be had from the hub as safetensors; check name and "
                "network"
            ) from error
        if not trust_remote_code and "custom code" in str(error):
            raise UserError(
                f"model {source}: it brings Python of its own; read it, then set trust_remote_code: true"
            ) from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"model {source}: cannot be loaded ({reason}); get or make it anew") from error


def load_config(source: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """What a model's weights are like, without them. Raises UserError as `load_causal` does."""
    return _pretrained(AutoConfig, source, trust_remote_code)


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with a model, as it is; `data.chat.prepare_tokenizer` repairs it."""
    return _pretrained(AutoTokenizer, source, trust_remote_code)


def _model(
    auto: Any,
    source: str,
    device: torch.device,
    trust_remote_code: bool,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    gguf = source.endswith(".gguf")
    kind = {"quantization_config": GgufConfig(dequantize=True)} if gguf else {"use_safetensors": True}
    model, info = _pretrained(auto, source, trust_remote_code, dtype=dtype, output_loading_info=True, **kind)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"model {source}: it brings an adapter along; merge it into its model and name the result"
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
    # Not `.to(dtype)` afterwards: that would round the frequencies of rotary positions, too, which are to stay float32.
    return _model(AutoModelForSequenceClassification, source, device, trust_remote_code, dtype)


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
