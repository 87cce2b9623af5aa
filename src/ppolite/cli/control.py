"""The command for control tasks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import tyro

from ppolite.cli.place import Set_
from ppolite.config import run_folder, shipped
from ppolite.control.config import control_recipe, load_control, load_control_run
from ppolite.types import UserError


def control(
    env: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV|RECIPE|RUN")],
    *,
    algorithm: str | None = None,
    seed: int | None = None,
    steps: int | None = None,
    out: Path | None = None,
    set: Set_ = (),  # noqa: A002
) -> None:
    """Learn a control task: policy, evaluation, GIF and report.

    They go to runs/NAME-ALGORITHM-SEED, NAME being that of a shipped recipe (cartpole) or the environment's. A
    finished run is evaluated anew, for instance with --set evaluation.episodes=1000.

    Args:
        env: A Gymnasium id (CartPole-v1), a recipe (YAML), the name of a shipped one (cartpole), or a run folder.
        algorithm: a2c, is-pg, ppo-kl or ppo-clip; the recipe's own when left out.
        seed: Every random stream derives from it.
        steps: Environment steps.
        out: Folder for the results.
        set: Change a key of the recipe, for instance --set optim.lr=1e-3. May be repeated.
    """
    given = {"seed": seed, "steps": steps}
    sets = (*set, *(f"{key}={value}" for key, value in given.items() if value is not None))
    if Path(env).is_dir():
        if algorithm or out or any(not s.startswith("evaluation.") for s in sets):
            raise UserError(f"{env}: is a run folder; only --set evaluation.KEY=VALUE goes with it")
        folder, config = Path(env), load_control_run(Path(env), sets)
    elif env in shipped():
        raise UserError(f"{env}: a recipe of RLHF, not of control; `ppolite run {env}` runs it")
    else:
        config = load_control(env, algorithm=algorithm, overrides=sets)
        name = control_recipe(env)
        folder = out or run_folder(f"{name.stem if name else env}-{config.algorithm}-{config.seed}", env)
    if importlib.util.find_spec("gymnasium") is None:
        raise UserError(
            "`ppolite control` needs gymnasium, which is not installed; it comes with the extra `control` (pip install "
            "'.[control]' in ppolite's folder)"
        )
    from ppolite.control.run import look, run_control

    result = look(config, folder) if Path(env).is_dir() else run_control(config, folder)
    print(
        f"{config.env}, {config.algorithm}, {result['steps']:,} steps, seed {config.seed}: return "
        f"{result['return_mean']:.1f} ± {result['return_std']:.1f} over {result['episodes']} episodes"
    )
    print(f"report: {folder / 'report.html'}")
