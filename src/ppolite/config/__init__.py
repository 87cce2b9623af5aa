"""The recipe: everything a run is told, typed, checked and explained, importable without torch.

A recipe is a YAML file of the keys below; every key has a default but the data. Unknown keys are refused with
the nearest known one, and contradictions are found before anything is loaded:

    recipe = load_recipe("recipes/film.yaml", overrides=["ppo.steps=3"])

    recipe.py        the sections and the whole            parts.py       what several sections are made of
    ppo.py           the policy's training                 sources.py     who scores it
    reading.py       files, overrides, what is said of mistakes
    strict_yaml.py   YAML without its surprises            secrets.py     what no recipe may hold
    safety.py        checkpoints, faults, alarms
    explaining.py    what each key means, and where its value comes from
"""

from ppolite.config.explaining import REQUIRED, Key, explained, marked
from ppolite.config.parts import Adam, Data, Optim, Train, Trunk
from ppolite.config.ppo import KL, PPO
from ppolite.config.reading import (
    RECIPES,
    at_home,
    explain,
    put,
    read_override,
    read_tree,
    recipe_text,
    run_folder,
    save_recipe,
    yaml_text,
)
from ppolite.config.recipe import (
    SFT,
    Evaluation,
    Iterate,
    Recipe,
    Reward,
    changed_keys,
    load_recipe,
    parse_recipe,
    recipe_origins,
    recipe_path,
    shipped,
)
from ppolite.config.safety import Checkpoint, Faults, Watch
from ppolite.config.secrets import NAMES_SECRET, refuse_secrets
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
    "KL", "NAMES_SECRET", "PPO", "RECIPES", "REQUIRED", "SFT", "SOURCES", "Adam", "Checkpoint", "ClassifierSource",
    "Data", "Evaluation", "Faults", "FormatSource", "FunctionSource", "HttpSource", "Iterate", "Judge", "Key",
    "LengthSource", "ModelSource", "Optim", "Recipe", "Reward", "Section", "Source", "Train", "Trunk", "Watch",
    "at_home", "changed_keys", "explain", "explained", "load_recipe", "marked", "parse_recipe", "put",
    "read_override", "read_tree", "recipe_origins", "recipe_path", "recipe_text", "refuse_secrets", "run_folder",
    "save_recipe", "shipped", "yaml_text",
]  # fmt: skip
