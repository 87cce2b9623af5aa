"""The recipe: everything a run is told, typed, checked and explained, importable without torch.

A recipe is a YAML file of the keys below; every key has a default but the data. Unknown keys are refused with
the nearest known one, and contradictions are found before anything is loaded:

    recipe = load_recipe("recipes/film.yaml", overrides=["ppo.steps=3"])

    recipe.py    the sections and the whole                parts.py     what several sections are made of
    ppo.py       the policy's training                     sources.py   who scores it
    safety.py    checkpoints, faults, alarms
    reading.py   files, overrides, and what is said of mistakes
"""

from ppolite.config.parts import Adam, Data, Optim, Train, Trunk
from ppolite.config.ppo import KL, PPO
from ppolite.config.reading import RECIPES, apply_override, explain, read_tree, save_recipe
from ppolite.config.recipe import (
    SFT,
    Evaluation,
    Iterate,
    Recipe,
    Reward,
    changed_keys,
    load_recipe,
    parse_recipe,
    recipe_path,
    shipped,
)
from ppolite.config.safety import Checkpoint, Faults, Watch
from ppolite.config.section import Section
from ppolite.config.sources import (
    SOURCES,
    ClassifierSource,
    FormatSource,
    FunctionSource,
    HttpSource,
    Judge,
    LengthSource,
    ModelSource,
    Source,
)

__all__ = [
    "KL", "PPO", "RECIPES", "SFT", "SOURCES", "Adam", "Checkpoint", "ClassifierSource", "Data", "Evaluation",
    "Faults", "FormatSource", "FunctionSource", "HttpSource", "Iterate", "Judge", "LengthSource", "ModelSource",
    "Optim", "Recipe", "Reward", "Section", "Source", "Train", "Trunk", "Watch", "apply_override", "changed_keys",
    "explain", "load_recipe", "parse_recipe", "read_tree", "recipe_path", "save_recipe", "shipped",
]  # fmt: skip
