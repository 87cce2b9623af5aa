"""The place: rights, room on the disk and in memory, what has to be installed. Nothing is left there."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ppolite.config import Checkpoint, Recipe
from ppolite.models.memory import free_memory
from ppolite.stages.doctor.finding import Finding, graded, skipped

WEIGHT = 4
"""Bytes: trained weights, moments and results are float32."""


@dataclass(frozen=True)
class Need:
    """Bytes that a stage will write: one checkpoint, and its result. Metrics and rollouts are small beside them."""

    checkpoint: int
    result: int
    best: int = 0
    """Of the checkpoint, the best weights so far, which lie in the CPU's memory."""

    def memory(self, device: torch.device) -> int:
        """Bytes that training adds to what is loaded: as a checkpoint, with gradients in the place of weights."""
        return self.checkpoint - (0 if device.type == "cpu" else self.best)

    @classmethod
    def of(cls, model: nn.Module, trained: Iterable[nn.Parameter], best: Iterable[nn.Parameter] = ()) -> Need:
        """A checkpoint holds what is trained with two moments each, and the `best` weights so far.

        The result is the whole model, into which adapters (PEFT's `lora_A`, `lora_B`) are merged.
        """
        merged = (weight for name, weight in model.named_parameters() if "lora_" not in name)
        return cls(3 * _bytes(trained) + _bytes(best), _bytes(merged), _bytes(best))


def _bytes(weights: Iterable[nn.Parameter]) -> int:
    return WEIGHT * sum(weight.numel() for weight in weights)


def rights(run_dir: Path) -> Finding:
    """Whether a file can be made there, or in the folder that it is going to be made in."""
    name, place = "place/rights", _nearest(run_dir)
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return Finding(
            name,
            "fail",
            f"{place}: {error.strerror}",
            "choose another --out, or get the right to write there",
        )
    return Finding(name, "ok", f"{place} can be written to")


def disk(run_dir: Path, config: Checkpoint, needs: Sequence[Need]) -> Finding:
    """Room for the results of all stages and for the checkpoints of the largest one, one more while it is written."""
    free = shutil.disk_usage(_nearest(run_dir)).free
    results = sum(need.result for need in needs)
    checkpoints = (config.keep + 1) * max(need.checkpoint for need in needs)
    return graded(
        "place/disk",
        f"{told(free)} free, {told(results)} of results and up to {told(checkpoints)} of checkpoints to come",
        "free some space, choose another --out, or set checkpoint.keep lower",
        warn=free < results + checkpoints,
        fail=free < results or (free < results + checkpoints and config.on_error == "stop"),
    )


def memory(device: torch.device, need: Need) -> Finding:
    """Room for gradients, moments and the best weights so far.

    Activations are not counted: they follow the token budget, which gives way where they do not fit (`Fitting`).
    `place/plan` of the full form counts them.
    """
    name, free, wanted = "place/memory", free_memory(device), need.memory(device)
    if free is None:
        return skipped(name, f"this system does not say how much memory of {device} is free")
    return graded(
        name,
        f"{told(free)} free on {device}, {told(wanted)} of gradients and moments to come, activations apart",
        "close what else runs there, raise trunk.split, or set train.kind to lora",
        warn=wanted > 0.8 * free,
        fail=wanted > free,
    )


def judge(recipe: Recipe) -> Finding:
    """Hours of training should not end in a missing package."""
    name = "place/judge"
    if recipe.evaluation.judge == "none" and (recipe.iterate is None or recipe.iterate.by != "judge"):
        return skipped(name, "the recipe asks for no judge")
    return graded(
        name,
        "vaderSentiment",
        "it is not installed: pip install vaderSentiment, or set evaluation.judge to none",
        fail=importlib.util.find_spec("vaderSentiment") is None,
    )


def _nearest(folder: Path) -> Path:
    """The folder, or the one that is there of those it will be made in."""
    return next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())


def told(count: float) -> str:
    """Bytes with a unit, in powers of 1024 as `ppolite plan` counts."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
