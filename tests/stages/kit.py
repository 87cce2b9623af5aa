"""What tests of PPO share: a reward of one's own, and looks at what a run left."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.world import GOOD
from torch import Tensor, nn

from ppolite.types import Rollout


@dataclass
class Wants:
    """A scorer made of a function of the text."""

    judge: Callable[[str], float]

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [self.judge(r.text) for r in rollouts]


def goods(text: str) -> float:
    """How many of the words are good ones."""
    return float(sum(word in GOOD for word in text.split()))


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def outcome(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith("time")} for row in rows]
    return rows, (folder / "policy" / "model.safetensors").read_bytes()
