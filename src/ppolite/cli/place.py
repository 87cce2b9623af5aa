"""What the commands share: words of the command line, and which recipe and folder they name."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import tyro

from ppolite.config import Recipe, load_recipe, recipe_path, run_folder
from ppolite.types import UserError

Recipe_ = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE|RUN")]
Run_ = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Set_ = Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE"), tyro.conf.UseAppendAction]
Allow_ = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Again_ = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Json_ = Annotated[bool, tyro.conf.arg(name="json")]

PARTS = (
    "sft", "reward", "reward_units.json", "round-*", "rollouts", "checkpoints", "tensorboard", "metrics.jsonl",
    "*.log", ".*",
)  # fmt: skip
"""What may lie in a folder before it is a run."""


@dataclass
class Place:
    """A recipe and the folder its results go to."""

    recipe: Recipe
    run_dir: Path


def place_of(source: str, out: Path | None, overrides: tuple[str, ...]) -> Place:
    """A recipe file (results in runs/ITS_NAME), a run folder, or the name of a shipped recipe."""
    path = Path(source)
    if path.is_dir():
        if out is not None:
            raise UserError(f"{path}: is a run folder, which has its place; --out goes with a recipe file")
        return Place(recipe_of(path, overrides), path)
    return Place(load_recipe(path, overrides), out or run_folder(recipe_path(path).stem, source))


def check_run(run_dir: Path) -> None:
    if not (run_dir / "recipe.yaml").exists():
        raise UserError(f"{run_dir}: no run folder (it has no recipe.yaml); `ppolite run RECIPE` makes one")


def check_folder(run_dir: Path) -> None:
    """Refuse to train into somebody's folder of other things."""
    if (run_dir / "recipe.yaml").exists() or not run_dir.is_dir():
        return
    names = sorted(path.name for path in run_dir.iterdir())
    if others := [name for name in names if not any(fnmatch(name, pattern) for pattern in PARTS)]:
        raise UserError(f"{run_dir}: is no run folder, and holds {others[0]}; choose another with --out")


def recipe_of(run_dir: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    check_run(run_dir)
    return load_recipe(run_dir / "recipe.yaml", overrides)


def judge_is_there(asked: str = "evaluation.judge is vader", without: str = "evaluation.judge=none") -> None:
    """Ten minutes of training should not end in a missing package."""
    if importlib.util.find_spec("vaderSentiment") is None:
        raise UserError(
            f"{asked}, but vaderSentiment is not installed; `pip install vaderSentiment`, "
            f"or go on with --set {without}"
        )


def check_judge(recipe: Recipe) -> None:
    """The judge who is to evaluate has to be installed."""
    if recipe.evaluation.judge == "vader":
        judge_is_there()


def show_table(result: dict[str, Any]) -> None:
    from rich.console import Console

    from ppolite.obs.table import before_after_table

    Console().print(before_after_table(result))
