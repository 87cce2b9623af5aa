"""ppolite: RLHF with PPO, from human scores to a better chat model.

    from ppolite import PPO, SFT, RewardModel, load_recipe

    recipe = load_recipe("recipes/film.yaml")
    ppo = PPO(recipe, "runs/mine", scorer=my_scorer)
    rollouts = ppo.generate(ppo.next_prompts())
    metrics = ppo.step(rollouts, ppo.score(rollouts))

The names below are the public API. They are looked up when first used, since the stages bring in torch and the
configuration and the command line do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ppolite.config import Recipe, load_recipe
from ppolite.types import Message, Prompt, Rollout, Sampling, Scorer, UserError

if TYPE_CHECKING:
    from ppolite.stages.ppo import PPO
    from ppolite.stages.reward import RewardModel
    from ppolite.stages.sft import SFT

__version__ = "0.1.0"
__all__ = [
    "PPO",
    "SFT",
    "Message",
    "Prompt",
    "Recipe",
    "RewardModel",
    "Rollout",
    "Sampling",
    "Scorer",
    "UserError",
    "load_recipe",
]

_STAGES = {"PPO": "ppo", "SFT": "sft", "RewardModel": "reward"}


def __getattr__(name: str) -> Any:
    if name not in _STAGES:
        raise AttributeError(f"module 'ppolite' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ppolite.stages.{_STAGES[name]}"), name)
