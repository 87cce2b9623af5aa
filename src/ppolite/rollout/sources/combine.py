"""Several sources as one score, and the units in which they meet.

    z_j     = (value_j − shift_j) / scale_j                   each judge
    score   = mean_w(z) − k · std_w(z) + Σ_p weight_p · penalty_p
    mean_w  = Σ_j w_j z_j / Σ_j w_j ;  std_w = √(mean_w((z − mean_w(z))²))

k is `ppo.disagreement`: with several judges of one thing the score is a lower bound, so that what pleases only some of
them (the usual form of over-optimisation) is worth less. The penalties are 0 or negative.

The run's reward model comes in its own units (decision 0004). Other judges come as they are (shift 0, scale 1), a
classifier and whoever's `shift` or `scale` is empty in units that are measured: mean and standard deviation on answers
of the SFT model, once, kept in RUN/reward_units.json.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from ppolite.config import PPO, Judge, ModelSource
from ppolite.models.roles import Norm
from ppolite.obs.run_files import Form, read_json, write_json
from ppolite.rollout.record import Origin
from ppolite.rollout.sources.foreign import checked
from ppolite.types import Rollout, Scorer, UserError

log = logging.getLogger("ppolite")


@dataclass
class Combined:
    """The scorer that `ppo.rewards` describes. What each source gave stays with the rollout (`Rollout.rewards`)."""

    config: PPO
    sources: Mapping[str, Scorer]
    """By title, as in the recipe."""
    model_norm: Norm
    """Units of the run's reward model."""
    measure: Callable[[], dict[str, Norm]]
    """Units of the judges that need measuring; asked once."""
    units: dict[str, Norm] = field(default_factory=dict)

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        if not self.units:
            self.units = {**self.measure(), **fixed_units(self.config, self.model_norm)}
        columns = {title: values_of(title, source, rollouts) for title, source in self.sources.items()}
        for i, rollout in enumerate(rollouts):
            rollout.rewards = {title: values[i] for title, values in columns.items()}
        return [combined(r.rewards, self.config, self.units) for r in rollouts]


def values_of(title: str, source: Scorer, rollouts: Sequence[Rollout]) -> list[float]:
    """One finite number for each rollout, or NotFiniteError, or UserError."""
    then = "look at it and at the responses"
    return checked(source.score(rollouts), len(rollouts), f"rewards: `{title}`", then)


def combined(values: Mapping[str, float], config: PPO, units: Mapping[str, Norm]) -> float:
    """One rollout's score from what the sources gave for it, by title."""
    judged: list[tuple[float, float]] = []
    penalty = 0.0
    for source in config.rewards:
        value = values[source.title]
        if source.title in units:
            unit = units[source.title]
            judged.append((source.weight, (value - unit.mean) / unit.std))
        else:
            penalty += source.weight * value
    if not judged:
        return penalty
    total = sum(w for w, _ in judged)
    mean = sum(w * z for w, z in judged) / total
    spread = math.sqrt(sum(w * (z - mean) ** 2 for w, z in judged) / total)
    return mean - config.disagreement * spread + penalty


def fixed_units(config: PPO, model_norm: Norm) -> dict[str, Norm]:
    """Units of the judges for which nothing is to be measured."""
    units: dict[str, Norm] = {}
    for source in config.rewards:
        if isinstance(source, ModelSource):
            units[source.title] = model_norm
        elif isinstance(source, Judge) and source.shift is not None and source.scale is not None:
            units[source.title] = Norm(source.shift, source.scale)
    return units


def measured_units(
    config: PPO,
    sources: Mapping[str, Scorer],
    draw: Callable[[], Sequence[Rollout]],
    path: Path,
    origin: Callable[[], Origin],
) -> dict[str, Norm]:
    """Units of the other judges: those on file where they are of this origin, else measured on what `draw` gives."""
    open_ = [s for s in config.rewards if isinstance(s, Judge) and None in (s.shift, s.scale)]
    if not open_:
        return {}
    asked = {
        s.title: s.model_dump(mode="json", exclude={"name", "weight"})
        | {"fingerprint": getattr(sources[s.title], "fingerprint", None)}
        for s in open_
    }
    wanted = {**origin(), "sources": asked}
    if (kept := _on_file(path, wanted)) is not None:
        return kept
    samples = draw()
    units: dict[str, Norm] = {}
    for source in open_:
        values = values_of(source.title, sources[source.title], samples)
        mean, std = fmean(values), pstdev(values)
        if source.scale is None and std == 0:
            raise UserError(
                f"rewards: `{source.title}` gives {mean:g} for all of {len(values)} answers of the SFT model, so "
                "there is no scale to measure; mend it, or set its scale"
            )
        units[source.title] = unit = Norm(
            mean if source.shift is None else source.shift, std if source.scale is None else source.scale
        )
        log.info("rewards: `%s` counts as (value − %.4g) / %.4g", source.title, unit.mean, unit.std)
    _write(path, wanted, units)
    return units


def _on_file(path: Path, wanted: Origin) -> dict[str, Norm] | None:
    kept = read_json(path, Measured, "delete it, so that it is measured anew")
    if kept is None:
        return None
    if kept["origin"] != wanted:
        log.warning("%s: its units were measured with other sources or samples; measuring anew", path)
        return None
    return {title: Norm(float(u["shift"]), float(u["scale"])) for title, u in kept["units"].items()}


class _Unit(Form):
    shift: FiniteFloat
    scale: Annotated[FiniteFloat, Field(gt=0)]


class Measured(Form):
    """`reward_units.json`."""

    origin: dict[str, Any]
    units: dict[str, _Unit]


def _write(path: Path, origin: Origin, units: Mapping[str, Norm]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {title: {"shift": unit.mean, "scale": unit.std} for title, unit in units.items()}
    write_json(path, {"origin": origin, "units": kept})
