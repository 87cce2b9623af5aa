"""What keeps a stage's loop safe: metrics that tell each step once, checkpoints, signals, and a way back.

    with Session("sft", trainer, total) as session:
        for step in session:
            with session.untouched():
                loss = trainer.gradients(...)
            session.log(trainer.update(..., loss))
        trainer.save()

Entered, it puts the trainer into the state of the last checkpoint, if an earlier process left one. Between two steps
it writes checkpoints that are due, stops where SIGINT or SIGTERM came during the step, and goes back to the last
checkpoint where too many updates in a row had to be skipped. Left without an error, the stage has its result: then
the checkpoints go.

Going back gives the weights, the moments and the controllers of the checkpoint; the data, the seeds and the schedules
go on where they are, since the same data would do the same again.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

from ppolite.config import Recipe, changed_keys, parse_recipe, save_recipe
from ppolite.dist import single
from ppolite.obs.alone import alone
from ppolite.obs.run_files import write_json
from ppolite.obs.sinks import MetricsLog, progress
from ppolite.stages.checkpoint import Checkpoints, State
from ppolite.stages.learner import Skips
from ppolite.types import Interrupted, UserError

log = logging.getLogger("ppolite")


class Trainer(Protocol):
    """What a stage trains, as far as a session is concerned."""

    recipe: Recipe
    run_dir: Path
    reads: str
    """Fingerprint of its data."""
    skips: Skips

    def state(self) -> State:
        """All that the steps to come depend on and that the recipe does not say."""
        ...

    def restore(self, state: State) -> None: ...

    def go_back(self, state: State) -> None:
        """Weights, moments and controllers of that state, and nothing else."""
        ...


class Session:
    """One stage's loop over `total` steps. `allow_changes`: go on although the recipe says something else now."""

    def __init__(self, stage: str, trainer: Trainer, total: int, *, allow_changes: bool = False) -> None:
        self.stage, self.trainer, self.total, self.allow_changes = stage, trainer, total, allow_changes
        self.recipe, self.run_dir = trainer.recipe, trainer.run_dir
        self.checkpoints = Checkpoints(self.run_dir, stage, self.recipe.checkpoint)
        self.step = self.returns = 0

    def __enter__(self) -> Session:
        single(f"the loop of {self.stage}")
        with ExitStack() as stack:
            stack.enter_context(alone(self.run_dir))
            stack.push(self._finish)
            again = begin_again(self.stage, self.trainer, allow_changes=self.allow_changes)
            self.begun_anew, (self.step, self.returns) = again is None, again or (0, 0)
            self.checkpoints.begin()
            save_recipe(self.recipe, self.run_dir / "recipe.yaml")
            self.metrics = stack.enter_context(
                MetricsLog(self.run_dir, self.stage, after=-1 if self.begun_anew else self.step)
            )
            self._tick = stack.enter_context(progress(self.stage, total=self.total, start=self.step))
            self._signals = stack.enter_context(_Signals(f"`ppolite run {self.run_dir}` goes on"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._stack.__exit__(kind, *error)
        if kind is None:
            if self._signals.caught:
                raise Interrupted(
                    f"interrupted at the end of {self.stage}; {self._how_on()}", self._signals.caught
                )
        elif issubclass(kind, Exception) and (steps := self.checkpoints.steps()):
            log.warning("the last checkpoint is of %s; %s", self._where(steps[-1]), self._how_on())

    def _finish(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self.checkpoints.finish()

    def __iter__(self) -> Iterator[int]:
        """The steps to do, counted from 1."""
        self._signals.wait = True
        while self.step < self.total:
            self.step += 1
            yield self.step
            if self.trainer.skips.in_row > self.recipe.faults.skips:
                self._go_back()
            # Weights by which nothing can be updated may be what a checkpoint is needed against.
            sound = not self.trainer.skips.in_row
            if self._signals.caught or (sound and self.checkpoints.due(self.step)):
                self.save(self.step)
            if self._signals.caught:
                raise Interrupted(
                    f"interrupted after {self._where(self.step)}; {self._how_on()}", self._signals.caught
                )

    def log(self, values: Mapping[str, Any], said: str = "", *, ticks: int = 1) -> None:
        """The metrics of this step, once, and a line for the progress."""
        self.metrics.log(self.step, values)
        self._tick(ticks, said)

    def save(self, step: int) -> None:
        """A checkpoint as of the end of that step."""
        self.metrics.sync()
        self.checkpoints.save(step, _whole_state(self.trainer, self.returns))

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """For what comes before a step's first update: where it fails or is stopped, the state until then is kept.

        So a second signal may stop at once here, and nowhere else in the loop.
        """
        before = _whole_state(self.trainer, self.returns)
        try:
            with self._signals.at_once():
                yield
        except Interrupted:
            if self.step - 1 not in self.checkpoints.steps():
                self.metrics.sync()
                self.checkpoints.save(self.step - 1, before)
            raise
        except Exception:
            self.save(self.step - 1)
            raise

    def _go_back(self) -> None:
        path = self.run_dir / "faults" / f"{self.stage}-step-{self.step:05d}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"stage": self.stage, "step": self.step, "skipped": self.trainer.skips.batches})
        skips, self.returns = self.trainer.skips.in_row, self.returns + 1
        what = f"{self._where(self.step)}: {skips} updates in a row had to be skipped, since {self.trainer.skips.why}"
        most, found = self.recipe.faults.returns, self.checkpoints.latest(_is_sound)
        if found is None or self.returns > most:
            why = (
                "there is no checkpoint to go back to"
                if self.returns <= most
                else f"faults.returns is {most}"
            )
            raise UserError(
                f"{what}, and {why}. Their batches are in {path}; lower the learning rate, or look at them"
            )
        self.trainer.go_back(found[1]["trainer"])
        self.trainer.skips.clear()
        log.warning("%s; back to the weights of step %d. Their batches are in %s", what, found[0], path)

    def _where(self, step: int) -> str:
        return f"{self.stage} step {step} of {self.total}"

    def _how_on(self) -> str:
        return f"`ppolite run {self.run_dir}` goes on from there"


def write_checkpoint(stage: str, trainer: Trainer, step: int) -> None:
    """A checkpoint outside of a session, for loops of one's own."""
    checkpoints = Checkpoints(trainer.run_dir, stage, trainer.recipe.checkpoint)
    checkpoints.begin()
    save_recipe(trainer.recipe, trainer.run_dir / "recipe.yaml")
    checkpoints.save(step, _whole_state(trainer, 0))


def begin_again(stage: str, trainer: Trainer, *, allow_changes: bool) -> tuple[int, int] | None:
    """Put the trainer into the state of the last checkpoint, if there is one. Returns its step and its returns.

    Raises UserError where recipe or data have changed since, unless `allow_changes`, or the state does not fit.
    """
    checkpoints = Checkpoints(trainer.run_dir, stage, trainer.recipe.checkpoint)
    found = checkpoints.latest()
    if found is None:
        return None
    step, state = found
    if changed := _what_changed(stage, trainer, state, checkpoints.folder):
        if not allow_changes:
            raise UserError(
                f"{checkpoints.folder}: the stage was begun with {changed}; put that back, go on as it is now by "
                "--allow-changes, or delete that folder to begin the stage anew"
            )
        log.warning("%s: begun with %s; going on as it is now", stage, changed)
    try:
        trainer.restore(state["trainer"])
        trainer.skips.restore(state["skips"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{checkpoints.folder}: its state does not fit this recipe ({error}); go on with the recipe that it was "
            "made with, or delete that folder to begin the stage anew"
        ) from error
    log.info("%s: going on after step %d", stage, step)
    return step, state["returns"]


def _whole_state(trainer: Trainer, returns: int) -> State:
    return {
        "recipe": trainer.recipe.model_dump(mode="json"),
        "reads": trainer.reads,
        "returns": returns,
        "skips": trainer.skips.state(),
        "trainer": trainer.state(),
    }


def _is_sound(state: State) -> bool:
    """Whether the last update before it was not skipped."""
    return not state["skips"]["in_row"]


def _what_changed(stage: str, trainer: Trainer, state: State, folder: Path) -> str:
    """In words, of what the stage depends on; empty where nothing did. Keys that are newer than the state have the
    values that they have by default."""
    others = {*{"sft", "reward", "ppo"} - {stage}, "iterate", "evaluation", "checkpoint", "doctor"}
    try:
        old = parse_recipe(state["recipe"], where=f"the recipe in {folder}")
    except UserError as error:
        return f"a recipe that this version does not take ({error})"
    keys = changed_keys(old.model_dump(mode="json"), trainer.recipe.model_dump(mode="json"))
    changed = [key for key in keys if key.partition(".")[0] not in others]
    told = [f"other values of {', '.join(changed)}"] if changed else []
    if state["reads"] != trainer.reads:
        told.append("data that reads differently")
    return " and ".join(told)


class _Signals:
    """SIGINT and SIGTERM. The first one waits for the end of the step; so does the second one, where half a step could
    not be undone; the third one waits for nothing."""

    def __init__(self, how_on: str) -> None:
        self.how_on = how_on
        self.caught = self.count = 0
        self.wait = False
        """Whether what has been done since the last checkpoint would be lost."""

    def __enter__(self) -> _Signals:
        here = threading.current_thread() is threading.main_thread()  # Python lets no other thread listen
        self._before = {
            number: signal.signal(number, self._catch)
            for number in ((signal.SIGINT, signal.SIGTERM) if here else ())
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In here, the second one stops the process."""
        self.wait = False
        try:
            if self.count > 1:
                self._stop(self.caught)
            yield
        finally:
            self.wait = True

    def _catch(self, number: int, frame: object) -> None:
        self.count += 1
        self.caught = self.caught or number
        if self.count > 2 or (self.count == 2 and not self.wait):
            self._stop(number)
        said = "finishing this step, then writing a checkpoint"
        if self.count == 2:
            said = "its updates have begun, so it is finished; once more stops, and loses all since the last checkpoint"
        elif not self.wait:
            said += "; once more stops at once, without this step"
        os.write(2, f"\n{said}\n".encode())  # not by print: the signal may have come amid one

    def _stop(self, number: int) -> NoReturn:
        raise Interrupted(f"stopped at once; {self.how_on}", number)
