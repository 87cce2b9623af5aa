"""Rollouts with a text and columns, as a source sees them, and small classifiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tests.world import write_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from ppolite.types import Finish, Prompt, Rollout


def said(
    text: str, prompt: str = "p", *, tokens: int = 3, finish: Finish = "stop", **columns: Any
) -> Rollout:
    """A response to a user's turn."""
    asked = Prompt(messages=({"role": "user", "content": prompt},), source="a.jsonl row 1", columns=columns)
    return Rollout(asked, [1], [7] * tokens, text, torch.zeros(tokens), finish)


def classifier(folder: Path, *, seed: int = 0, context: int = 64, **config: Any) -> Path:
    """A random Llama that classifies, with the world's tokenizer; `config` goes to its configuration."""
    write_model(folder, context=context)
    shape: dict[str, Any] = json.loads((folder / "config.json").read_text())
    made = LlamaConfig(
        **{k: v for k, v in shape.items() if k not in ("architectures", "model_type")} | config
    )
    torch.manual_seed(seed)
    LlamaForSequenceClassification(made).save_pretrained(folder)
    return folder
