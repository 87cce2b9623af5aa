"""A whole recipe, stage after stage, into one run folder. What is finished is not done again.

    sft → reward → ppo → eval → report

A stage is finished when its result has its name in the folder; results get their names in one rename. `branch` makes
a run that has its first stages from another one.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppolite.config import Recipe, changed_keys, load_recipe
from ppolite.models.export import replaced
from ppolite.obs.report import AGAIN, write_report
from ppolite.obs.run_files import Evaluation, read_json
from ppolite.obs.sinks import METRICS, read_metrics
from ppolite.stages.checkpoint import stage_folder
from ppolite.stages.evaluate import evaluate_run
from ppolite.stages.opening import round_folders, sft_folder
from ppolite.stages.ppo import PPO
from ppolite.stages.reward import ITEMS, RewardModel
from ppolite.stages.rows import read_rows, split_rows, tests_of
from ppolite.stages.sft import SFT
from ppolite.types import UserError

log = logging.getLogger("ppolite")

RESULTS = {"sft": "sft", "reward": "reward", "ppo": "policy"}
STAGES: dict[str, Any] = {"sft": SFT, "reward": RewardModel, "ppo": PPO}
FREE = {
    "evaluation", "checkpoint", "faults", "doctor", "device", "dtype", "roles", "train.recompute", "trunk.keep",
    "decode_rows", "ppo.min_rm_accuracy", "iterate.rounds",
}  # fmt: skip
"""Keys that may change between stages of one run: they alter no finished result's meaning."""


def is_finished(place: Path, stage: str) -> bool:
    """With a result, and without checkpoints, which an unfinished stage has."""
    return (place / RESULTS[stage]).exists() and not stage_folder(place, stage).exists()


def finished_stages(run_dir: Path) -> list[str]:
    """Of the run or of one of its rounds."""
    places = [run_dir, *round_folders(run_dir)]
    return [stage for stage in RESULTS if any(is_finished(place, stage) for place in places)]


def check_unchanged(recipe: Recipe, run_dir: Path, redo: str | None = None) -> None:
    """Refuse a recipe that differs from the one that the folder's finished stages were made with.

    `redo` is the stage about to be done again: its section may differ, unless a later stage was built on its
    result. Raises UserError naming the changed keys.
    """
    path = run_dir / "recipe.yaml"
    done, rounds = finished_stages(run_dir), round_folders(run_dir)
    if redo in done and redo == done[-1] and not rounds:
        done.remove(redo)
    if not path.exists() or not (done or rounds):
        return
    if changed := _changed(load_recipe(path), recipe, done, rounds=bool(rounds)):
        done += ["candidates"] if rounds else []
        raise UserError(
            f"{run_dir}: its finished stages ({', '.join(done)}) were made with other values of "
            f"{', '.join(changed)}; choose another folder with --out, or delete this one"
        )


def _changed(old: Recipe, new: Recipe, done: Sequence[str], *, rounds: bool) -> list[str]:
    """Keys with other values, of those that what is `done` depends on."""
    loose = FREE | (set(RESULTS) - set(done)) | (set() if rounds else {"iterate"})
    if "reward" not in done:
        loose.add("iterate.held_out")
    if "ppo" not in done:
        loose.add("watch")
    drawn_from = {"ppo.prompts"} if rounds else set[str]()
    keys = changed_keys(old.model_dump(mode="json"), new.model_dump(mode="json"))
    return [key for key in keys if _within(key, drawn_from) or not _within(key, loose)]


def _within(key: str, sections: set[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def branch(recipe: Recipe, source: Path, target: Path, stage: str) -> None:
    """A new run folder with what the stages before `stage` have made in `source`; `recipe` is what it will go on with.

    Files are shared, not copied, where the disk can do that: no stage writes into a finished result. Raises UserError
    where `target` is there already, a stage before is unfinished, or was made by another recipe.
    """
    if target.exists():
        raise UserError(f"{target}: is there already; `ppolite {stage} {target}` goes on with it")
    old, order = load_recipe(source / "recipe.yaml"), list(RESULTS)
    folders = {"sft": sft_folder(source), "reward": source / "reward"}
    there: list[str] = []
    for name in order[: order.index(stage)]:
        if is_finished(folders[name].parent, name):
            there.append(name)
        elif getattr(old, name) is not None:
            raise UserError(f"{source}: its {name} is not finished; `ppolite {name} {source}` comes first")
    if changed := _changed(old, recipe, there, rounds=False):
        raise UserError(
            f"{source}: its {' and '.join(there)} were made with other values of {', '.join(changed)}; leave those as "
            "they are, or begin from a recipe file"
        )
    rows = [row for row in read_metrics(source) if row["stage"] in there]
    with replaced(target) as draft:
        for name in there:
            shutil.copytree(folders[name], draft / name, copy_function=_share)
        (draft / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        shutil.copy2(source / "recipe.yaml", draft)


def _share(source: str, target: str) -> None:
    """The same file under a second name, or a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def run_stage(
    stage: str, recipe: Recipe, run_dir: Path, *, again: bool = True, allow_changes: bool = False
) -> dict[str, Any]:
    """One stage into the folder, from what the stages before it left there, or from where it was interrupted.

    `allow_changes`: go on with an interrupted stage although the recipe has changed.
    Raises UserError where the stage is finished and not to be done `again`.
    """
    check_unchanged(recipe, run_dir, redo=stage)
    if is_finished(run_dir, stage) and not again:
        beside = "a recipe with --out NEW" if stage == "sft" else f"`ppolite {stage} {run_dir} --out NEW`"
        raise UserError(
            f"{run_dir}: its {stage} is finished; --again does it anew in its place, {beside} beside it"
        )
    return STAGES[stage](recipe, run_dir).run(allow_changes=allow_changes)


def _look_ahead(recipe: Recipe, stages: list[str]) -> None:
    """Read what stages after the first one will read: a missing file, or too few prompts, should not wait for hours."""
    if recipe.reward is not None and "reward" in stages[1:]:
        data = recipe.reward.source
        split_rows(read_rows(data, ITEMS[recipe.reward.kind])[0], data, recipe.seed)
    if recipe.ppo is not None and "ppo" in stages[1:]:
        data = recipe.ppo.prompts
        tests_of(split_rows(read_rows(data, "prompts")[0], data, recipe.seed)[1], recipe.ppo)


def evaluated(recipe: Recipe, run_dir: Path) -> dict[str, Any] | None:
    """The evaluation on disk, unless the policy is newer or other settings are asked for."""
    path = run_dir / "eval.json"
    if not path.exists() or path.stat().st_mtime < (run_dir / "policy").stat().st_mtime:
        return None
    result = read_json(path, Evaluation, AGAIN)
    return result if result and result.get("evaluation") == recipe.evaluation.model_dump() else None


def run_recipe(recipe: Recipe, run_dir: Path, *, allow_changes: bool = False) -> dict[str, Any]:
    """All stages that the recipe has and the folder lacks, then evaluation (returned) and report."""
    if recipe.iterate is not None:
        raise UserError("the recipe has a section `iterate`, which only `ppolite iterate` reads; use that")
    if recipe.reward is not None:
        _ = recipe.reward.source  # not only after SFT, and of a finished one too
    check_unchanged(recipe, run_dir)
    wanted = [stage for stage in RESULTS if getattr(recipe, stage) is not None]
    if not wanted:
        raise UserError("the recipe has none of the sections sft, reward and ppo, so there is nothing to run")
    done = finished_stages(run_dir)
    _look_ahead(recipe, [stage for stage in wanted if stage not in done])
    for stage in wanted:
        if stage in done:
            log.info("%s: finished before, kept (%s)", stage, run_dir / RESULTS[stage])
        else:
            run_stage(stage, recipe, run_dir, allow_changes=allow_changes)
    result: dict[str, Any] = {}
    if recipe.ppo is not None:
        gc.collect()  # PPO's parts refer to each other, and the evaluation might not fit beside them
        result = evaluated(recipe, run_dir) or evaluate_run(recipe, run_dir)
    log.info("report: %s", write_report(run_dir))
    return result
