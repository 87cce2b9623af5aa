"""The model: finite weights, no dropout, and a split that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ppolite.config import Recipe
from ppolite.models.trunk import Trunk, checked_trunk
from ppolite.stages.doctor.finding import Finding, graded
from ppolite.stages.opening import Opened
from ppolite.types import UserError

SPLIT = "model/split"


def weights(parts: Mapping[str, nn.Module]) -> Finding:
    """Every weight a finite number; `parts` by what a person calls them. Weights that they share are looked at once."""
    count, seen, broken = 0, set[int](), list[str]()
    for part, module in parts.items():
        for name, weight in module.named_parameters():
            if id(weight) not in seen:
                seen.add(id(weight))
                count += weight.numel()
                if not torch.isfinite(weight).all():
                    broken.append(f"{part} {name}")
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    return graded(
        "model/weights",
        f"{broken[0]}{more} not finite" if broken else f"{count / 1e6:,.1f} million, all finite",
        "take another copy of that model, or train it anew",
        fail=bool(broken),
    )


def dropout(parts: Mapping[str, nn.Module]) -> Finding:
    """Off, whatever the configuration says: with it no log-prob is had twice."""
    acting = [
        f"{part} {name or type(module).__name__} ({key} {share:g})"
        for part, whole in parts.items()
        for name, module in whole.named_modules()
        if module.training
        for key, share in _shares(module)
    ]
    configured = [
        f"{key} {share:g}"
        for whole in parts.values()
        for key, share in sorted(getattr(getattr(whole, "config", None), "__dict__", {}).items())
        if "drop" in key and isinstance(share, float) and share > 0
    ]
    off = f"off ({', '.join(dict.fromkeys(configured))} in the configuration)" if configured else "off"
    return graded(
        "model/dropout",
        f"acts in {acting[0]} and {len(acting) - 1} more places" if acting else off,
        "call .eval() on that model; PPO's ratio is taken between log-probs without dropout",
        fail=bool(acting),
    )


def _shares(module: nn.Module) -> Iterator[tuple[str, float]]:
    """Shares that the module drops while it is in training mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        yield from (("p", module.p),) if module.p > 0 else ()
    for key, share in vars(module).items():
        if "dropout" in key and isinstance(share, float) and share > 0:
            yield key, share


def split(trunk: Trunk, asked: int) -> Finding:
    """What the comparison at the start came to, for a trunk that was opened."""
    gap = "" if trunk.gap is None else f", {trunk.gap:.1g} from the plain model (log-probs, gradients)"
    return graded(
        SPLIT,
        f"cut at layer {trunk.split}{gap}"
        if trunk.split == asked
        else f"trunk.split: {asked} changes its results, so it is cut at {trunk.split}",
        f"set trunk.split to {trunk.split}: then the recipe says what happens, or choose another model",
        warn=trunk.split != asked,
    )


def open_split(recipe: Recipe, opened: Opened, rows: Sequence[Sequence[int]]) -> Finding:
    """The same for a model that is not cut yet, compared on token ids of real rows."""
    asked = recipe.trunk.split
    try:
        return split(checked_trunk(opened.model, asked, rows, lambda _: None, opened.dtype), asked)
    except UserError as error:
        return Finding(SPLIT, "fail", f"cannot be cut at {asked}", str(error))
