"""What a stage is examined for before its first step, on the objects that it has loaded anyway.

Seconds: nothing is loaded again, and of PPO one small round is played (`probe.py`). What is surely wrong stops the run
before it costs anything; what is odd is logged. Not done again when an interrupted stage goes on. Scorers of the
recipe's `ppo.rewards`, or given in Python, are not asked: they may remember calls, and PPO's first look at held-out
prompts asks them at once.

`ppolite doctor` makes the same checks, and slower ones (`full.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ppolite.config import Recipe
from ppolite.models.body import Body
from ppolite.models.trunk import Trunk
from ppolite.stages.checkpoint import Checkpoints
from ppolite.stages.doctor import chat, model, place, probe, reward
from ppolite.stages.doctor.finding import Finding, graded
from ppolite.stages.doctor.place import Need
from ppolite.stages.doctor.probe import Plays, Probe
from ppolite.stages.opening import Opened
from ppolite.types import Prompt, UserError

log = logging.getLogger("ppolite")

ROWS, TOKENS = 12, 16
"""Of the round that is played."""


class Fits(Protocol):
    """`SFT` and `RewardModel`, as far as they are looked at here."""

    recipe: Recipe
    run_dir: Path
    opened: Opened
    trunk: Trunk
    body: Body
    train: list[Any]
    held: list[Any]
    first: list[tuple[Prompt, str]]
    """Some of what it trains on."""
    left_out: int

    @property
    def limit(self) -> int: ...


def before_fit(stage: str, trainer: Fits) -> None:
    """Examine SFT or the reward model before its first step. Raises UserError where something is surely wrong."""
    _before(stage, trainer, need_of_fit(trainer), lambda: of_fit(stage, trainer))


def before_ppo(trainer: Plays) -> None:
    """Examine PPO before its first step. Raises UserError where something is surely wrong."""
    _before("ppo", trainer, need_of_ppo(trainer), lambda: of_ppo(trainer, probe.play(trainer, ROWS, TOKENS)))


def _before(stage: str, trainer: Fits | Plays, need: Need, examine: Callable[[], list[Finding]]) -> None:
    recipe, run_dir = trainer.recipe, trainer.run_dir
    if recipe.doctor == "off" or Checkpoints(run_dir, stage, recipe.checkpoint).steps():
        return
    started = time.perf_counter()
    found = [place.rights(run_dir), place.disk(run_dir, recipe.checkpoint, [need]), *examine()]
    odd = [finding for finding in found if finding.verdict in ("warn", "fail")]
    for finding in odd:
        if finding.verdict == "fail":
            raise UserError(
                f"{finding.name}: {finding.figure}; {finding.remedy}. `ppolite doctor` tells more, and --set "
                "doctor=off trains all the same"
            )
        log.warning("doctor: %s: %s; %s", finding.name, finding.figure, finding.remedy)
    log.info(
        "doctor: %d checks before %s in %.1f s, %s",
        len(found), stage, time.perf_counter() - started, f"{len(odd)} warnings" if odd else "all is well",
    )  # fmt: skip


def of_fit(stage: str, trainer: Fits) -> list[Finding]:
    parts = {"model": trainer.opened.model, stage: trainer.body}
    return [
        place.memory(trainer.opened.device, need_of_fit(trainer)),
        model.weights(parts),
        model.dropout(parts),
        model.split(trainer.trunk, trainer.recipe.trunk.split),
        *chat.examine(trainer.opened, trainer.first),
        lengths(stage, trainer),
        *([reward.asked(trainer.recipe)] if stage == "reward" else []),
    ]


def of_ppo(trainer: Plays, played: Probe) -> list[Finding]:
    roles = trainer.roles
    bodies = {"policy": roles.policy, "reference": roles.reference, "critic": roles.critic}
    parts = {"model": trainer.opened.model, **bodies} | (
        {"reward model": roles.reward} if roles.reward else {}
    )
    return [
        place.memory(trainer.opened.device, need_of_ppo(trainer)),
        place.judge(trainer.recipe),
        model.weights(parts),
        model.dropout(parts),
        model.split(roles.trunk, trainer.recipe.trunk.split),
        *chat.asking(trainer.opened, played.rollouts[0].prompt),
        *reward.examine(played, roles.norm, fresh=not trainer.config.start),
        *probe.examine(trainer, played),
    ]


def need_of_fit(trainer: Fits) -> Need:
    return Need.of(trainer.opened.model, trainer.body.trained())


def need_of_ppo(trainer: Plays) -> Need:
    policy, critic = trainer.roles.policy.trained(), trainer.roles.critic.trained()
    return Need.of(trainer.opened.model, [*policy, *critic], best=policy)


def lengths(stage: str, trainer: Fits) -> Finding:
    """Rows that are too long and thus left out."""
    kept = len(trainer.train) + len(trainer.held)
    return graded(
        f"{stage}/lengths",
        f"{trainer.left_out:,} of {kept + trainer.left_out:,} rows are longer than {trainer.limit:,} tokens",
        f"raise {stage}.max_tokens where the model's context allows it, or shorten them: they are left out",
        warn=trainer.left_out > 0.05 * kept,
    )
