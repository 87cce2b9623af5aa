"""Opens what scores a run: its reward model, or the sources of `ppo.rewards`. PPO and evaluation ask here.

ppolite ppo recipes/film.yaml --set 'ppo.rewards=[{kind: model}, {kind: length, max: 30, weight: 0.1}]'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ppolite.config import (
    ClassifierSource,
    FormatSource,
    FunctionSource,
    HttpSource,
    LengthSource,
    ModelSource,
    Recipe,
    Source,
)
from ppolite.models.roles import Norm, Roles
from ppolite.rollout.behaviour import origin_of
from ppolite.rollout.score import TrunkScorer
from ppolite.rollout.sources.classifier import ClassifierScorer
from ppolite.rollout.sources.combine import Combined, measured_units
from ppolite.rollout.sources.foreign import columns_of
from ppolite.rollout.sources.function import FunctionScorer
from ppolite.rollout.sources.http import HttpScorer
from ppolite.rollout.sources.rules import FormatPenalty, LengthPenalty
from ppolite.stages.opening import Opened
from ppolite.stages.seeds import derive_seed
from ppolite.types import Prompt, Rollout, Scorer, UserError


def open_scorer(
    recipe: Recipe, run_dir: Path, opened: Opened, roles: Roles, prompts: Sequence[Prompt]
) -> Scorer:
    """The recipe's scorer. `prompts` are those of training: on the first ones units are measured.

    Scores of `ppo.rewards` are rewards already, so `roles.norm`, which would make them that, does nothing
    afterwards.
    """
    assert recipe.ppo is not None
    config = recipe.ppo
    model = TrunkScorer(roles, config.optim.micro_batch_tokens)
    if not config.rewards:
        return model
    if config.asks_model and roles.reward is None:
        raise UserError(
            f"{run_dir}: ppo.rewards names kind model, but there is no reward model in it; train one with "
            "`ppolite reward`, or take it out"
        )
    columns = columns_of(prompts)
    sources = {
        source.title: open_source(source, model, opened, config.optim.micro_batch_tokens, columns)
        for source in config.rewards
    }
    norm, roles.norm = roles.norm, replace(Norm(), offset=roles.norm.offset)
    asked = list(prompts[: config.unit_samples or 256])
    seed = derive_seed(recipe.seed, "reward-units")

    def draw() -> list[Rollout]:
        with roles.reference.adapters(False):
            return opened.generator(roles.reference).generate(asked, config.sampling, seed=seed)

    origin = partial(origin_of, roles, asked, config, seed)
    measure = partial(measured_units, config, sources, draw, run_dir / "reward_units.json", origin)
    return Combined(config, sources, norm, measure)


def open_source(
    source: Source, model: TrunkScorer, opened: Opened, budget: int, columns: Sequence[str]
) -> Scorer:
    """One entry of `ppo.rewards`; `model` asks the run's reward model, `columns` are those of the prompts."""
    match source:
        case ModelSource():
            return model
        case FunctionSource():
            return FunctionScorer(source, columns)
        case HttpSource():
            return HttpScorer(source, columns)
        case ClassifierSource():
            return ClassifierScorer(source, opened.device, budget)
        case LengthSource():
            return LengthPenalty(source)
        case FormatSource():
            return FormatPenalty(source)
        case _:
            raise AssertionError(source)


def scored_by(recipe: Recipe) -> list[str]:
    """Who scores, by title."""
    assert recipe.ppo is not None
    return [source.title for source in recipe.ppo.rewards] or ["model"]
