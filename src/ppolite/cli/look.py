"""Commands that look: at a recipe before it runs, and at a run afterwards."""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import tyro

from ppolite.cli.place import (
    Json_,
    Recipe_,
    Run_,
    Set_,
    check_judge,
    check_run,
    place_of,
    recipe_of,
    show_table,
)
from ppolite.config import (
    Recipe,
    explained,
    load_recipe,
    read_tree,
    recipe_origins,
    recipe_path,
    recipe_text,
    shipped,
)
from ppolite.control.config import (
    Control,
    control_origins,
    control_recipe,
    is_control_run,
    load_control,
    shipped_control,
)
from ppolite.types import UserError

log = logging.getLogger("ppolite")


def recipe_(
    recipe: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE|RUN")] = None,
    *,
    explain: bool = False,
    set: Set_ = (),  # noqa: A002
) -> None:
    """Print the resolved recipe as YAML, every key with its value; it is a recipe again.

    Without a name, list those that are shipped.

    Args:
        recipe: A recipe (YAML) of language or control, the name of a shipped one (film, cartpole), or a run folder.
        explain: Also print what each key means, its default, and where its value comes from.
        set: Change a key of the recipe, for instance --set ppo.steps=20. May be repeated.
    """
    if recipe is None:
        if explain or set:
            raise UserError("which recipe? Name one, for instance `ppolite recipe film --explain`")
        _list_shipped()
        return
    path = Path(recipe)
    if path.is_dir():
        check_run(path)
        path = path / "recipe.yaml"
    resolved: Recipe | Control
    if _is_control(path):
        resolved, origins = load_control(str(path), overrides=set), control_origins(str(path), set)
        default = Control(env=resolved.env, algorithm=resolved.algorithm)
    else:
        resolved, origins, default = load_recipe(path, set), recipe_origins(path, set), Recipe()
    if not explain:
        print(recipe_text(resolved), end="")
        return
    from rich.console import Console

    from ppolite.obs.recipe_view import recipe_view

    console = Console(highlight=False)
    view = recipe_view(explained(resolved, origins, default), min(console.width, 120))
    console.print(view, soft_wrap=True, end="")


def _list_shipped() -> None:
    """How each shipped recipe is run, and the first sentence of its comment."""
    control = shipped_control()
    for name, path in ({name: recipe_path(name) for name in shipped()} | control).items():
        tree = read_tree(path, [])
        command = "control" if name in control else "iterate" if "iterate" in tree else "run"
        comment = takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
        about = " ".join(line.removeprefix("#").strip() for line in comment)
        print(f"{f'ppolite {command} {name}':29} {re.split(r'(?<=[.?]) ', about)[0]}")


def _is_control(path: Path) -> bool:
    if path.is_file():
        return "env" in read_tree(path, [])
    return str(path) not in shipped() and control_recipe(str(path)) not in (None, path)


def plan(
    recipe: Recipe_,
    *,
    gpu: str | None = None,
    json_: Json_ = False,
    set: Set_ = (),  # noqa: A002
) -> int:
    """Say what memory a recipe will need, part by part, before anything is loaded; exit code 1 where it does not fit.

    Args:
        recipe: A recipe (YAML), the name of a shipped one (film), or a run folder.
        gpu: The memory of a GPU, such as 24GiB; the machine at hand when left out.
        json_: Print one JSON object, in bytes, instead of a table.
        set: Change a key of the recipe, for instance --set train.recompute=true. May be repeated.
    """
    resolved = place_of(recipe, None, set).recipe
    from rich.console import Console

    from ppolite.obs.plan_view import plan_view
    from ppolite.stages.plan import memory
    from ppolite.stages.plan import plan as make

    made = make(resolved, None if gpu is None else memory(gpu))
    if json_:
        print(json.dumps(made.as_json()))
    else:
        Console().print(plan_view(made.as_json()))
    return 0 if made.fits else 1


def doctor(
    recipe: Recipe_,
    *,
    out: Path | None = None,
    json_: Json_ = False,
    set: Set_ = (),  # noqa: A002
) -> int:
    """Examine a recipe or a run before it costs hours: data, template, model, reward model, one small round, disk.

    Exit code 1 where a check fails. Nothing is written. A quick form of it runs before every training.

    Args:
        recipe: A recipe (YAML), the name of a shipped one (film), or a run folder.
        out: The folder that results would go to; runs/RECIPE when left out.
        json_: Print one JSON object instead of a table.
        set: Change a key of the recipe. May be repeated.
    """
    place = place_of(recipe, out, set)
    from rich.console import Console

    from ppolite.obs.table import findings_table
    from ppolite.stages.doctor.full import examine

    log.setLevel(logging.ERROR)  # the table tells what the stages would log as they open

    def say(part: str) -> None:
        print(f"looking at {part}", file=sys.stderr)

    found = [asdict(finding) for finding in examine(place.recipe, place.run_dir, say=say)]
    failed = sum(finding["verdict"] == "fail" for finding in found)
    if json_:
        print(json.dumps({"failed": failed, "checks": found}, ensure_ascii=False))
    else:
        Console().print(findings_table(found))
    return 1 if failed else 0


def eval_(run: Run_, *, json_: Json_ = False, set: Set_ = ()) -> None:  # noqa: A002
    """Compare the SFT model and the trained policy on held-out prompts; writes RUN/eval.json.

    Args:
        run: A run folder.
        json_: Print one JSON object instead of a table.
        set: Change a key for this evaluation, for instance --set evaluation.prompts=500. May be repeated.
    """
    recipe = recipe_of(run, set)
    check_judge(recipe)
    from ppolite.stages.evaluate import evaluate_run
    from ppolite.stages.run import check_unchanged

    check_unchanged(recipe, run)
    told = recipe_of(run).evaluation
    if recipe.evaluation != told and (run / "eval.json").exists():
        log.warning("%s is replaced by an evaluation of other settings than the run's own", run / "eval.json")
    result = evaluate_run(recipe, run)
    if json_:
        print(json.dumps({k: v for k, v in result.items() if k != "samples"}))
    else:
        show_table(result)


def report(run: Run_) -> None:
    """Write RUN/report.html (one self-contained page) and PNGs: curves, reward against KL, samples, tokens.

    Args:
        run: A run folder.
    """
    if is_control_run(run):
        from ppolite.obs.control_report import write_control_report

        print(write_control_report(run))
        return
    recipe_of(run)
    from ppolite.obs.report import write_report
    from ppolite.obs.rounds import is_iterated, write_rounds_report

    print(write_rounds_report(run) if is_iterated(run) else write_report(run))
