"""A control run on disk: train, save, evaluate, film, report.

runs/NAME/
  recipe.yaml      resolved, every key
  metrics.jsonl    one object every `log_every` steps; tensorboard/ mirrors it
  policy/          model.safetensors, policy.json
  eval.json  agent.gif  control.png  report.html
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
from pathlib import Path
from typing import Any

from ppolite.config import save_recipe
from ppolite.control.config import Control, is_control_run
from ppolite.control.envs import known_env
from ppolite.control.evaluate import evaluate, film
from ppolite.control.policy import Policy
from ppolite.control.train import train
from ppolite.obs.alone import alone
from ppolite.obs.control_report import write_control_report
from ppolite.obs.sinks import METRICS, MetricsLog
from ppolite.types import Interrupted, UserError

log = logging.getLogger("ppolite")

POLICY = "policy"


def run_control(config: Control, run_dir: Path) -> dict[str, Any]:
    """All of it, into a new folder, or one whose run was interrupted. Returns what eval.json says."""
    known_env(config)  # what cannot begin should leave no folder
    with alone(run_dir):
        _make_room(run_dir)
        save_recipe(config, run_dir / "recipe.yaml")
        try:
            policy = train(config, run_dir)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted before a policy was saved; `{_anew(run_dir)}` starts anew", signal.SIGINT
            ) from None
        policy.save(run_dir / POLICY, _about(config))
        return look(config, run_dir)


def look(config: Control, run_dir: Path) -> dict[str, Any]:
    """Evaluate and film the saved policy, and write the report. Raises UserError where there is none."""
    if not (run_dir / POLICY).exists():
        raise UserError(
            f"{run_dir}: was interrupted before a policy was saved; `{_anew(run_dir)}` starts anew"
        )
    policy = Policy.load(run_dir / POLICY)
    result = evaluate(policy, config)
    if not all(map(math.isfinite, result.values())):
        raise UserError(f"{run_dir}: its policy has run away, to a return that is no number; lower optim.lr")
    with MetricsLog(run_dir, "control") as metrics:
        metrics.log(config.whole_steps, {f"eval/{k}": v for k, v in result.items()})
    whole = _about(config) | result
    (run_dir / "eval.json").write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (run_dir / "agent.gif").unlink(missing_ok=True)
    if config.evaluation.gif_seconds:
        film(policy, config, run_dir / "agent.gif")
    log.info("report: %s", write_control_report(run_dir))
    return whole


def _about(config: Control) -> dict[str, Any]:
    return {
        "env": config.env,
        "algorithm": config.algorithm,
        "seed": config.seed,
        "steps": config.whole_steps,
    }


def _anew(run_dir: Path) -> str:
    return f"ppolite control {run_dir / 'recipe.yaml'} --out {run_dir}"


def _make_room(run_dir: Path) -> None:
    """What an interrupted control run left goes; anything else is refused."""
    if (run_dir / POLICY).exists():
        raise UserError(
            f"{run_dir}: holds a finished run; look at it with `ppolite control {run_dir}`, choose another folder "
            "with --out, or delete this one"
        )
    if any(run_dir.iterdir()):
        if not is_control_run(run_dir):
            raise UserError(f"{run_dir}: is not empty, and no control run; choose another folder with --out")
        (run_dir / METRICS).unlink(missing_ok=True)
        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
