"""The reward model, by the scores that it gives: finite, not constant, not a count of tokens, in its units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ppolite.config import Recipe
from ppolite.models.roles import Norm
from ppolite.obs.metrics import pearson, spearman
from ppolite.stages.doctor.finding import Finding, graded, skipped
from ppolite.stages.doctor.probe import Probe

ALONE = 0.9
"""A correlation with length from which on there is little else in a score: 80 % of the variance."""


def examine(played: Probe, norm: Norm, *, fresh: bool) -> list[Finding]:
    """`fresh`: the answers are the SFT model's, for which its units were measured."""
    if played.scores is None:
        return [
            skipped(f"reward model/{name}", "there is no reward model yet")
            for name in ("scores", "length", "units")
        ]
    found = [spread(played.scores)]
    if found[0].verdict == "ok":
        found.append(length(played.scores, [len(r.response_ids) for r in played.rollouts]))
        if fresh and played.own:
            found.append(units(played.scores, norm))
    return found


def asked(recipe: Recipe) -> Finding:
    """Whether PPO will ask the reward model that is trained for it."""
    name = "reward model/asked"
    if recipe.ppo is None:
        return Finding(name, "ok", "the recipe has no PPO")
    if not recipe.ppo.rewards:
        return Finding(name, "ok", "it alone scores")
    titles = ", ".join(source.title for source in recipe.ppo.rewards)
    return graded(
        name,
        f"ppo.rewards lists {titles}",
        "none of them is the reward model; add {kind: model}, or leave out the section `reward`",
        warn=not recipe.ppo.asks_model,
    )


def spread(scores: Sequence[float]) -> Finding:
    """Scores of answers: finite, and not all the same."""
    known = torch.tensor(scores, dtype=torch.float64)
    broken = int((~known.isfinite()).sum())
    low, high = float(known.min()), float(known.max())
    constant = not broken and high - low <= 1e-5 * max(abs(low), abs(high), 1.0)
    return graded(
        "reward model/scores",
        f"{broken} of {len(scores)} not finite"
        if broken
        else f"{low:.3g} … {high:.3g} for {len(scores)} answers",
        "train it anew: nothing can be learned from these scores",
        fail=bool(broken) or constant,
    )


def length(scores: Sequence[float], tokens: Sequence[int], given: Sequence[float] = ()) -> Finding:
    """Whether the score is little more than the answer's length, in either direction.

    `given` is what people gave for the same answers: they may like long ones too.
    """
    name, rho = "reward model/length", _strongest(scores, tokens)
    people = f", of people's {_strongest(given, tokens):+.2f}" if given else ""
    return graded(
        name,
        f"correlation of the score with the number of tokens {rho:+.2f}{people}",
        "give it answers of all lengths among the good and the bad ones, or subtract a length penalty (ppo.rewards)",
        warn=abs(rho) > ALONE,
    )


def units(scores: Sequence[float], norm: Norm) -> Finding:
    """Whether answers of the SFT model have the mean and the deviation that its normalisation says."""
    known = torch.tensor(scores, dtype=torch.float64)
    mean, std = float(known.mean()), float(known.std(correction=0))
    off = abs(mean - norm.mean) / norm.std
    return graded(
        "reward model/units",
        f"mean {mean:.3g}, deviation {std:.3g}; it is normalised by {norm.mean:.3g} and {norm.std:.3g}",
        "its units were measured on answers of another model: train the reward model anew after SFT, or set "
        "ppo.reward_scale",
        warn=off > 3 or not norm.std / 4 < std < 4 * norm.std,
    )


def _strongest(scores: Sequence[float], tokens: Sequence[int]) -> float:
    """Pearson's or Spearman's correlation, whichever is farther from 0; 0 where one side does not vary."""
    both = [r for r in (pearson(scores, tokens), spearman(scores, tokens)) if math.isfinite(r)]
    return max(both, key=abs, default=0.0)
