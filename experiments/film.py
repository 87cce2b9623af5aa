"""Film critics that differ in PPO alone: SFT and reward model are trained once a seed, and shared.

    runs/results/film-SEED/            sft/, reward/ of recipes/film.yaml
    runs/results/NAME/CELL-SEED/       a run folder with the same sft/ and reward/, its own policy/, and cell.json

A cell that has its cell.json is finished and is not run again; it holds the commit and the machine that it was run at.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import commit, machine, versions

from experiments.result import CELLS, load
from ppolite.config import load_recipe
from ppolite.obs.report import write_report
from ppolite.obs.run_files import write_json
from ppolite.obs.sinks import read_metrics
from ppolite.stages.evaluate import evaluate_run
from ppolite.stages.run import check_unchanged, finished_stages, run_stage
from ppolite.types import UserError

RECIPE = "film"


def base(seed: int) -> Path:
    """The folder with SFT and reward model; what is missing is trained."""
    folder = CELLS / f"film-{seed}"
    recipe = load_recipe(RECIPE, [f"seed={seed}"])
    try:
        check_unchanged(recipe, folder)
    except UserError as error:
        sys.exit(str(error))
    for stage in ("sft", "reward"):
        if stage not in finished_stages(folder):
            run_stage(stage, recipe, folder)
    return folder


def cell(experiment: str, name: str, overrides: list[str], *, seed: int, dirty: bool) -> dict[str, Any]:
    """PPO with the film recipe's settings but `overrides`: settings, the log of its steps, the evaluation."""
    folder = CELLS / experiment / f"{name}-{seed}"
    sha = None if dirty else commit()
    if (folder / "cell.json").exists():
        made = load(folder / "cell.json")
        if made["overrides"] != overrides or (made["commit"] is None and not dirty):
            sys.exit(f"{folder}: was made with other settings, or by uncommitted code; delete it")
        if made["commit"] != sha:
            print(f"{folder}: kept as it was made, at {made['commit']}", flush=True)
        return made
    print(f"{experiment}: {name}, seed {seed}", flush=True)
    recipe = load_recipe(RECIPE, [f"seed={seed}", *overrides])
    shutil.rmtree(folder, ignore_errors=True)  # what was begun is of settings and code that nobody has noted
    source = base(seed)
    for part in ("sft", "reward"):
        shutil.copytree(source / part, folder / part)
    result = run_stage("ppo", recipe, folder)
    made = {
        "name": name,
        "seed": seed,
        "overrides": overrides,
        "commit": sha,
        "machine": machine() | versions("numpy", "peft"),
        "recipe": recipe.model_dump(mode="json"),
        "result": result,
        "steps": [row for row in read_metrics(folder) if row["stage"] == "ppo"],
        "eval": evaluate_run(recipe, folder),
    }
    write_report(folder)
    write_json(folder / "cell.json", made)
    return made


def column(made: dict[str, Any], *keys: str) -> list[tuple[float, ...]]:
    """The given metrics of a cell's steps that have all of them, in order."""
    return [tuple(row[k] for k in keys) for row in made["steps"] if all(k in row for k in keys)]


def short(made: dict[str, Any], samples: int = 6) -> dict[str, Any]:
    """What of a cell goes into the JSON: every figure, a few texts."""
    told = made["eval"]
    return made | {"eval": told | {"samples": told["samples"][:samples]}}
