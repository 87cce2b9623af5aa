"""An interrupted stage goes on to the bit; what fails on the way loses nothing; what is not finite changes nothing."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.stages.kit import Wants, goods, outcome, weights
from tests.world import World

from ppolite.models.export import save_policy
from ppolite.obs.alone import alone
from ppolite.obs.sinks import read_metrics
from ppolite.stages.checkpoint import Checkpoints
from ppolite.stages.learner import Fitting
from ppolite.stages.ppo import PPO
from ppolite.stages.reward import RewardModel
from ppolite.stages.run import STAGES, run_recipe, run_stage
from ppolite.stages.sft import SFT
from ppolite.types import Interrupted, Rollout, UserError

EVERY = {"checkpoint__every": 1}
STEPS = {**EVERY, "ppo__steps": 4, "ppo__eval_every": 2, "sft": None}


class Killed(BaseException):
    """The process is gone: nothing catches this."""


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Kill right after the n-th checkpoint is written."""
    save = Checkpoints.save

    def arm(number: int) -> None:
        written = 0

        def save_and_die(self: Checkpoints, step: int, state: dict[str, Any]) -> bool:
            nonlocal written
            written += 1
            done = save(self, step, state)
            if written == number:
                monkeypatch.setattr(Checkpoints, "save", save)
                raise Killed
            return done

        monkeypatch.setattr(Checkpoints, "save", save_and_die)

    return arm


def linked(finished_run: Path, folder: Path) -> Path:
    """A run folder with SFT and reward model."""
    folder.mkdir()
    for name in ("sft", "reward"):
        (folder / name).symlink_to(finished_run / name)
    return folder


# ---- to the bit --------------------------------------------------------------------------------------------

DRAWS_ANEW = {
    "ppo__behaviour": "sft", "ppo__sft_samples": 16, "ppo__ess_floor": 0.97, "ppo__on_low_ess": "draw",
    "ppo__optim__lr": 1e-2,
}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {"ppo__optim__schedule": "linear"},
    "adaptive": {"ppo__objective": "kl", "ppo__kl__target": 1.0, "ppo__kl__horizon": 50.0},
    "stale": {"ppo__behaviour": "stale", "ppo__stale_steps": 2, "ppo__objective": "is"},
    "sft": {"ppo__behaviour": "sft", "ppo__sft_samples": 32, "ppo__ess_floor": 0.0},
    "renewed": DRAWS_ANEW,
    "lora": {"train__kind": "lora", "ppo__samples_per_prompt": 4},
    "full": {"train__kind": "full", "trunk__split": 0},
    "one body": {"ppo__critic_body": "policy"},
    "function": {"ppo__rewards": [{"kind": "length", "max": 3}, {"kind": "model"}]},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_ppo_goes_on_to_the_bit(
    name: str, world: World, finished_run: Path, tmp_path: Path, killed_after: Callable[[int], None]
) -> None:
    recipe = world.recipe(**STEPS, **VARIANTS[name])
    whole, parts = (linked(finished_run, tmp_path / folder) for folder in ("whole", "parts"))
    run_stage("ppo", recipe, whole)
    for _ in range(3):  # it dies after step 1, again after step 2, and after step 3
        killed_after(1)
        with pytest.raises(Killed):
            run_stage("ppo", recipe, parts)
    run_stage("ppo", recipe, parts)
    assert outcome(parts) == outcome(whole)
    for path in whole.glob("rollouts/*"):
        assert path.read_bytes() == (parts / "rollouts" / path.name).read_bytes()
    if name == "renewed":
        assert any("ess/worn" in row for row in read_metrics(whole))
    assert not (parts / "checkpoints").exists()


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_sft_and_reward_model_go_on_to_the_bit(
    stage: str, kind: str, world: World, tmp_path: Path, killed_after: Callable[[int], None]
) -> None:
    recipe = world.recipe(**EVERY, train__kind=kind, reward__epochs=1.0)
    for folder, kills in (("whole", ()), ("parts", (1, 2))):
        for number in kills:
            killed_after(number)
            with pytest.raises(Killed):
                run_stage(stage, recipe, tmp_path / folder)
        run_stage(stage, recipe, tmp_path / folder)
    found = [
        (rows_of(tmp_path / folder), (tmp_path / folder / stage / "model.safetensors").read_bytes())
        for folder in ("whole", "parts")
    ]
    assert found[0] == found[1]
    assert len({row["step"] for row in found[0][0]}) == len(found[0][0]) > 3


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time")} for row in rows]


def test_a_reward_model_that_was_killed_while_it_was_saved(
    world: World, tmp_path: Path, killed_after: Callable[[int], None]
) -> None:
    """All updates are done, and their last checkpoint is written."""
    recipe = world.recipe(**EVERY, reward__epochs=1.0)
    whole = run_stage("reward", recipe, tmp_path / "whole")
    killed_after(8)
    with pytest.raises(Killed):
        run_stage("reward", recipe, tmp_path / "parts")
    assert read_metrics(tmp_path / "parts")[-1]["step"] == 8
    assert run_stage("reward", recipe, tmp_path / "parts") == whole
    a, b = (load_file(tmp_path / folder / "reward" / "model.safetensors") for folder in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_loop_of_ones_own(world: World, trained: Path) -> None:
    def trainer() -> PPO:
        return PPO(world.recipe(), trained, scorer=Wants(goods))

    first = trainer()
    assert first.resume() == 0
    for step in range(3):
        if step == 2:
            first.checkpoint()
        first.step(*first.next_round())
    second = trainer()
    assert second.resume() == 2
    second.step(*second.next_round())
    assert torch.equal(weights(first.roles.policy), weights(second.roles.policy))
    assert torch.equal(weights(first.roles.critic), weights(second.roles.critic))
    assert [r.response_ids for r in first.generate(first.next_prompts())] == [
        r.response_ids for r in second.generate(second.next_prompts())
    ]


def test_a_stage_that_is_done_again_leaves_no_rows_of_before(world: World, trained: Path) -> None:
    recipe = world.recipe(ppo__steps=2)
    run_stage("ppo", recipe, trained)
    before = outcome(trained)
    run_stage("ppo", recipe, trained)
    assert outcome(trained) == before


# ---- other recipes, other data -----------------------------------------------------------------------------


def test_a_changed_recipe_is_named(
    world: World, trained: Path, killed_after: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    killed_after(2)
    with pytest.raises(Killed):
        run_stage("ppo", world.recipe(**STEPS), trained)
    other = world.recipe(**{**STEPS, "ppo__steps": 3, "ppo__kl__beta": 0.2, "checkpoint__every": 2})
    with pytest.raises(
        UserError, match=r"begun with other values of ppo.kl.beta, ppo.steps; put that back, go on"
    ):
        run_stage("ppo", other, trained)
    run_stage("ppo", other, trained, allow_changes=True)
    assert "begun with other values of ppo.kl.beta, ppo.steps; going on as it is now" in caplog.text
    assert "ppo: going on after step 2" in caplog.text
    betas = {row["step"]: row["leash/beta"] for row in read_metrics(trained) if "leash/beta" in row}
    assert betas == {1: 0.05, 2: 0.05, 3: 0.2}


def test_a_way_back_keeps_what_the_recipe_says(world: World, trained: Path) -> None:
    state = PPO(world.recipe(), trained).state()
    ppo = PPO(world.recipe(ppo__kl__beta=0.2), trained)
    ppo.restore(state)
    ppo.go_back(state)
    assert ppo.leash.beta == 0.2


def test_a_best_policy_past_a_lower_max_kl_gives_way(
    world: World, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Scores fall from look to look, so that only its distance takes the first policy away."""
    falling = iter(range(100, 0, -1))
    ppo = PPO(world.recipe(), trained, scorer=Wants(lambda _: float(next(falling))))
    ppo.evaluate()
    state = ppo.state()
    state["heldout"]["best"] |= {"step": 3, "kl": 2.0}
    for most, kept in ((3.0, 3), (1.0, 4)):
        other = PPO(world.recipe(ppo__max_kl=most), trained, scorer=ppo.scorer)
        other.restore(state)
        other.steps_done = 4
        if most < 2:
            other.finish()
            assert (
                "the policy of step 3 is saved, kept while ppo.max_kl was higher: it is at 2.00 nats"
                in caplog.text
            )
        other.evaluate()
        assert other.heldout.best is not None
        assert other.heldout.best.step == kept


def test_rollouts_of_an_earlier_run_go(world: World, trained: Path) -> None:
    def steps() -> list[str]:
        return sorted(path.stem for path in (trained / "rollouts").glob("step-*.parquet"))

    run_stage("ppo", world.recipe(ppo__steps=3, ppo__eval_every=1), trained)
    assert steps() == ["step-00001", "step-00002", "step-00003"]
    run_stage("ppo", world.recipe(ppo__steps=1, ppo__eval_every=1), trained)
    assert steps() == ["step-00001"]


def test_a_state_that_is_older_than_a_key_goes_on(
    world: World, trained: Path, killed_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, latest = world.recipe(**STEPS), Checkpoints.latest
    killed_after(2)
    with pytest.raises(Killed):
        run_stage("ppo", recipe, trained)

    def of_before(self: Checkpoints) -> tuple[int, dict[str, Any]] | None:
        found = latest(self)
        assert found
        del found[1]["recipe"]["decode_rows"]
        return found

    def with_a_key_that_went(self: Checkpoints) -> tuple[int, dict[str, Any]] | None:
        found = latest(self)
        assert found
        found[1]["recipe"]["went"] = 1
        return found

    monkeypatch.setattr(Checkpoints, "latest", of_before)
    with pytest.raises(UserError, match=r"begun with other values of decode_rows; put that back"):
        run_stage("ppo", world.recipe(**STEPS, decode_rows=2), trained)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "latest", with_a_key_that_went)
        with pytest.raises(UserError, match=r"begun with a recipe that this version does not take .*`went`"):
            run_stage("ppo", recipe, trained)
    run_stage("ppo", recipe, trained)
    assert [row["step"] for row in read_metrics(trained) if "leash/beta" in row] == [1, 2, 3, 4]


def test_data_that_changed_is_noticed(
    world: World, tmp_path: Path, killed_after: Callable[[int], None]
) -> None:
    data = tmp_path / "examples.jsonl"
    rows = Path(world.path("examples")).read_text().splitlines(keepends=True)
    data.write_text("".join(rows))
    recipe = world.recipe(**EVERY, sft__data__path=str(data))
    killed_after(1)
    with pytest.raises(Killed):
        run_stage("sft", recipe, tmp_path / "run")
    data.write_text("".join(rows[1:]))
    with pytest.raises(UserError, match="begun with data that reads differently"):
        run_stage("sft", recipe, tmp_path / "run")
    run_stage("sft", recipe, tmp_path / "run", allow_changes=True)


def test_a_state_that_does_not_fit(world: World, trained: Path, killed_after: Callable[[int], None]) -> None:
    killed_after(1)
    with pytest.raises(Killed):
        run_stage("ppo", world.recipe(**STEPS), trained)
    lora = world.recipe(**STEPS, train__kind="lora")
    with pytest.raises(
        UserError, match=r"does not fit this recipe .the weights that are trained have other names"
    ):
        PPO(lora, trained).run(allow_changes=True)


# ---- signals -----------------------------------------------------------------------------------------------


def sends(number: int, at: int, times: int) -> Wants:
    """A scorer during whose `at`-th round this process gets a signal, or two."""
    asked = 0

    def judge(text: str) -> float:
        nonlocal asked
        asked += 1
        if asked == 16 * at + 8:  # 8 held-out prompts come first, a round has 16
            for _ in range(times):
                os.kill(os.getpid(), number)
        return goods(text)

    return Wants(judge)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_finishes_the_step(number: int, world: World, finished_run: Path, tmp_path: Path) -> None:
    whole, parts = (linked(finished_run, tmp_path / name) for name in ("whole", "parts"))
    recipe = world.recipe(**STEPS | {"checkpoint__every": 100})
    PPO(recipe, whole, scorer=Wants(goods)).run()
    before = signal.getsignal(number)
    with pytest.raises(
        Interrupted, match=r"interrupted after ppo step 2 of 4; `ppolite run .*parts` goes on"
    ) as stop:
        PPO(recipe, parts, scorer=sends(number, 2, 1)).run()
    assert stop.value.signal == number
    assert signal.getsignal(number) is before
    assert [row["step"] for row in read_metrics(parts)] == [0, 1, 2]
    PPO(recipe, parts, scorer=Wants(goods)).run()
    assert outcome(parts) == outcome(whole)


def test_a_second_signal_stops_at_once(world: World, finished_run: Path, tmp_path: Path) -> None:
    whole, parts = (linked(finished_run, tmp_path / name) for name in ("whole", "parts"))
    recipe = world.recipe(**STEPS)
    PPO(recipe, whole, scorer=Wants(goods)).run()
    with pytest.raises(Interrupted, match="stopped at once"):
        PPO(recipe, parts, scorer=sends(signal.SIGTERM, 3, 2)).run()
    assert [row["step"] for row in read_metrics(parts)] == [0, 1, 2]  # step 3 is lost, as one step may be
    PPO(recipe, parts, scorer=Wants(goods)).run()
    assert outcome(parts) == outcome(whole)


RARELY = {**STEPS, "checkpoint__every": 100}


@pytest.mark.parametrize(("changes", "at"), [({}, 3), (DRAWS_ANEW, 2)], ids=["fresh", "drawing anew"])
def test_a_second_signal_while_collecting_loses_that_step_alone(
    changes: dict[str, Any], at: int, world: World, finished_run: Path, tmp_path: Path
) -> None:
    whole, parts = (linked(finished_run, tmp_path / name) for name in ("whole", "parts"))
    recipe = world.recipe(**RARELY | changes)
    PPO(recipe, whole, scorer=Wants(goods)).run()
    with pytest.raises(Interrupted, match=r"^stopped at once; `ppolite run .*parts` goes on$"):
        PPO(recipe, parts, scorer=sends(signal.SIGINT, at, 2)).run()
    done = read_metrics(parts)[-1]["step"]
    assert Checkpoints(parts, "ppo", recipe.checkpoint).steps() == [done]
    PPO(recipe, parts, scorer=Wants(goods)).run()
    assert outcome(parts) == outcome(whole)
    if changes:
        assert "ess/worn" in read_metrics(whole)[done + 1]


@pytest.mark.parametrize(("amid_updates", "step"), [(1, 3), (2, 3), (3, 0)])
def test_signals_amid_the_updates(
    amid_updates: int,
    step: int,
    world: World,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What they have changed cannot be undone: two let the step be finished, the third costs what it must."""
    whole, parts = (linked(finished_run, tmp_path / name) for name in ("whole", "parts"))
    recipe = world.recipe(**RARELY)
    PPO(recipe, whole, scorer=Wants(goods)).run()
    stopped = PPO(recipe, parts, scorer=Wants(goods))
    update, asked = stopped.updates.update, 0

    def signalled_after_it(*args: Any) -> Any:
        nonlocal asked
        row = update(*args)
        asked += stopped.steps_done == 2
        if asked == 1:
            for _ in range(amid_updates):
                os.kill(os.getpid(), signal.SIGINT)
        return row

    monkeypatch.setattr(stopped.updates, "update", signalled_after_it)
    says = "interrupted after ppo step 3 of 4" if step else "stopped at once"
    with pytest.raises(Interrupted, match=says):
        stopped.run()
    assert Checkpoints(parts, "ppo", recipe.checkpoint).steps() == [step] * bool(step)
    said = capfd.readouterr().err
    assert "finishing this step, then writing a checkpoint\n" in said
    assert ("once more stops, and loses all since the last checkpoint" in said) == (amid_updates > 1)
    PPO(recipe, parts, scorer=Wants(goods)).run()
    assert outcome(parts) == outcome(whole)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_second_signal_before_the_update_of_sft_or_reward_model_loses_that_step_alone(
    stage: str, world: World, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = world.recipe(checkpoint__every=100)
    whole, parts = (linked(finished_run, tmp_path / name) for name in ("whole", "parts"))
    kind = {"sft": SFT, "reward": RewardModel}[stage]
    for folder in (whole, parts):
        (folder / stage).unlink()
    kind(recipe, whole).run()
    stopped = kind(recipe, parts)
    loss, asked = stopped.loss, 0

    def signalled_after_it(*args: Any, **options: Any) -> float:
        nonlocal asked
        asked += options.get("backward", True)
        value = loss(*args, **options)
        if asked == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return value

    monkeypatch.setattr(stopped, "loss", signalled_after_it)
    with pytest.raises(Interrupted, match="stopped at once"):
        stopped.run()
    assert Checkpoints(parts, stage, recipe.checkpoint).steps() == [2]
    kind(recipe, parts).run()
    name = Path(stage, "model.safetensors")
    assert (parts / name).read_bytes() == (whole / name).read_bytes()
    rows, others = ([{**row, "time": 0} for row in read_metrics(folder)] for folder in (whole, parts))
    assert rows == others


def test_a_signal_while_a_result_is_written_is_not_forgotten(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage is finished, and the next one does not begin."""
    sft = SFT(world.recipe(), tmp_path)

    def signalled(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save_policy(*args)

    monkeypatch.setattr("ppolite.stages.sft.save_policy", signalled)
    with pytest.raises(Interrupted, match="interrupted at the end of sft"):
        sft.run()
    assert (tmp_path / "sft" / "model.safetensors").is_file()
    assert not (tmp_path / "checkpoints").exists()


def test_the_command_says_how_to_go_on(world: World, tmp_path: Path) -> None:
    recipe = world.recipe_file(tmp_path / "r.yaml", sft__epochs=500.0, **EVERY)
    command = [sys.executable, "-m", "ppolite.cli", "sft", str(recipe), "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("sft "):
                process.send_signal(signal.SIGTERM)
                break
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert "\nfinishing this step, then writing a checkpoint" in said
    assert "goes on from there\n" in said
    assert "Traceback" not in said
    step = int(said.rpartition("interrupted after sft step ")[2].split()[0])
    assert Checkpoints(tmp_path / "run", "sft", world.recipe().checkpoint).steps()[-1] == step
    assert read_metrics(tmp_path / "run")[-1]["step"] == step


# ---- reward sources that fail ------------------------------------------------------------------------------


class Failing:
    """Likes good words, but fails in its n-th call."""

    def __init__(self, at: int, error: Exception | float) -> None:
        self.at, self.error, self.calls = at, error, 0
        self.seen: list[list[str]] = []

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        self.calls += 1
        self.seen.append([r.text for r in rollouts])
        if self.calls == self.at and isinstance(self.error, Exception):
            raise self.error
        scores = [goods(r.text) for r in rollouts]
        return [self.error, *scores[1:]] if self.calls == self.at else scores  # type: ignore[list-item]


@pytest.mark.parametrize("error", [UserError("the server is down"), ZeroDivisionError("by a stranger")])
@pytest.mark.parametrize("behaviour", ["fresh", "stale", "sft"])
def test_a_failed_source_loses_no_response(
    error: Exception,
    behaviour: str,
    world: World,
    finished_run: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, parts = (linked(finished_run, tmp_path / name) for name in ("whole", "parts"))
    recipe = world.recipe(**STEPS | {"checkpoint__every": 100}, ppo__behaviour=behaviour)
    PPO(recipe, whole, scorer=Wants(goods)).run()
    failing, good = Failing(2 if behaviour == "sft" else 3, error), Failing(0, error)
    with pytest.raises(type(error), match=str(error)):
        PPO(recipe, parts, scorer=failing).run()
    assert "goes on from there" in caplog.text
    PPO(recipe, parts, scorer=good).run()
    assert good.seen[0] == failing.seen[-1]  # the very responses that had no scores
    assert outcome(parts) == outcome(whole)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_costs_its_round(
    value: float, world: World, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = Failing(3, value)  # calls: held out, round 1, round 2
    PPO(world.recipe(**STEPS), trained, scorer=scorer).run()
    rows = [row for row in read_metrics(trained) if "samples/drawn" in row]
    assert [row["samples/skipped"] for row in rows] == [0, 16, 16, 16]
    assert [row["samples/drawn"] for row in rows] == [16, 48, 64, 80]
    assert f"number 0 is {value}" in caplog.text
    assert "Going on without these 16" in caplog.text
    assert len(list((trained / "rollouts").glob("unscored-*"))) == 1


def test_scores_that_are_never_finite_stop_the_run(world: World, trained: Path) -> None:
    good = iter([True] * 8)
    scorer = Wants(lambda text: 1.0 if next(good, False) else math.nan)
    with pytest.raises(UserError, match=r"number 0 is nan.* So it was 4 times in a row .faults.skips is 3."):
        PPO(world.recipe(**STEPS), trained, scorer=scorer).run()


def test_a_look_at_held_out_prompts_may_fail(
    world: World, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    PPO(world.recipe(**STEPS), trained, scorer=Failing(4, math.nan)).run()  # held out, 1, 2, held out
    assert [row["step"] for row in read_metrics(trained) if "heldout/score" in row] == [0, 4]
    assert "Going on without this look" in caplog.text


# ---- updates that come to nothing --------------------------------------------------------------------------


class Breaks:
    """Puts NaN into the policy's weights in its n-th call, as a fault of memory would."""

    def __init__(self, at: set[int]) -> None:
        self.at, self.calls = at, 0
        self.ppo: PPO | None = None

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        self.calls += 1
        if self.calls in self.at:
            assert self.ppo is not None
            with torch.no_grad():
                self.ppo.roles.policy.trained()[0].fill_(math.nan)
        return [goods(r.text) for r in rollouts]


def broken(world: World, folder: Path, at: set[int], **changes: Any) -> PPO:
    scorer = Breaks(at)
    scorer.ppo = PPO(world.recipe(**STEPS | changes), folder, scorer=scorer)
    return scorer.ppo


def test_a_broken_policy_goes_back_to_its_checkpoint(
    world: World, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ppo = broken(world, trained, {3})  # calls: held out, round 1, round 2
    ppo.run()
    assert "ppo step 2 of 4: 4 updates in a row had to be skipped" in caplog.text
    assert "back to the weights of step 1" in caplog.text
    skipped = [row["update/skipped"] for row in read_metrics(trained) if "update/skipped" in row]
    assert skipped == [0, 4, 4, 4]
    report = json.loads((trained / "faults" / "ppo-step-00002.json").read_text())
    assert len(report["skipped"]) == 4
    rows = report["skipped"][0]["batch"]["rows"]
    assert len(rows) == 8
    assert rows[0].keys() >= {"prompt", "response", "score", "logprobs", "advantages"}
    assert "nan" in rows[0]["logprobs"]
    saved = load_file(trained / "policy" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in saved.values())
    assert read_metrics(trained)[-1]["policy/grad_norm"] > 0


def test_it_does_not_go_back_for_ever(world: World, trained: Path) -> None:
    with pytest.raises(
        UserError, match=r"step 3 of 4: 4 updates .*faults.returns is 1. Their batches are in"
    ):
        broken(world, trained, {3, 5}, faults__returns=1).run()
    assert (trained / "faults" / "ppo-step-00003.json").exists()


def test_without_a_checkpoint_there_is_no_way_back(world: World, trained: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint to go back to"):
        broken(world, trained, {2}).run()


def test_one_bad_batch_of_sft_is_skipped(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of batch 2 is infinite; the next one counts again."""
    sft = SFT(world.recipe(**EVERY), tmp_path)
    original, calls = sft.loss, 0

    def loss(rows: Any, *, backward: bool) -> float:
        nonlocal calls
        calls += backward
        return math.inf if backward and calls == 2 else original(rows, backward=backward)

    monkeypatch.setattr(sft, "loss", loss)
    sft.run()
    rows = [row for row in read_metrics(tmp_path) if "update/skipped" in row]
    assert [row["update/skipped"] for row in rows] == [0, 1, 1, 1]
    assert [("grad_norm" in row) for row in rows] == [True, False, True, True]
    assert rows[1]["loss/train"] is None
    assert sft.learner.done == 3


LONGER = {**EVERY, "sft__epochs": 3.0}  # 12 steps


def breaks_at(sft: SFT, number: int, monkeypatch: pytest.MonkeyPatch, stop_at: int = 0) -> SFT:
    """Its weights are NaN from that update on, as if memory had failed; `stop_at`: a signal comes during that one."""
    original, calls = sft.loss, sft.learner.done

    def loss(rows: Any, *, backward: bool) -> float:
        nonlocal calls
        calls += backward
        if backward and calls == number:
            with torch.no_grad():
                sft.body.trained()[0].fill_(math.nan)
        if backward and calls == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return original(rows, backward=backward)

    monkeypatch.setattr(sft, "loss", loss)
    return sft


def test_broken_weights_are_in_no_checkpoint_that_a_run_goes_back_to(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With one update a step, four skipped ones are four steps, and there is a checkpoint after each."""
    breaks_at(SFT(world.recipe(**LONGER), tmp_path), 4, monkeypatch).run()
    assert "sft step 7 of 12: 4 updates in a row had to be skipped" in caplog.text
    assert "back to the weights of step 3" in caplog.text
    rows = read_metrics(tmp_path)
    assert rows[-1]["update/skipped"] == 4
    assert math.isfinite(rows[-1]["grad_norm"])
    saved = load_file(tmp_path / "sft" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in saved.values())


def test_interrupted_amid_skipped_updates_it_goes_on_as_if_it_had_not_been(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    breaks_at(SFT(world.recipe(**LONGER), whole), 4, monkeypatch).run()
    with pytest.raises(Interrupted, match="sft step 5 of 12"):
        breaks_at(SFT(world.recipe(**LONGER), parts), 4, monkeypatch, stop_at=5).run()
    SFT(world.recipe(**LONGER), parts).run()
    weights = Path("sft", "model.safetensors")
    assert (parts / weights).read_bytes() == (whole / weights).read_bytes()
    report = Path("faults", "sft-step-00007.json")
    assert (parts / report).read_text() == (whole / report).read_text()
    rows, others = ([{**row, "time": 0} for row in read_metrics(folder)] for folder in (whole, parts))
    assert rows == others


def test_figures_are_those_of_the_weights_that_it_goes_back_to_at_the_end(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = RewardModel(world.recipe(sft=None, ppo=None, doctor="off", checkpoint__every=7), tmp_path)
    update, last = model.update, model.learner.total - 3

    def broken(rows: Any, loss: float) -> dict[str, float]:
        nonlocal calls
        calls += 1
        return update(rows, loss if calls < last else math.nan)

    calls = 0
    monkeypatch.setattr(model, "update", broken)
    found = model.run()
    assert "back to the weights of step 14" in caplog.text
    logged = [row["heldout/spearman"] for row in read_metrics(tmp_path) if "heldout/spearman" in row]
    other = RewardModel(world.recipe(sft=None, ppo=None, doctor="off"), tmp_path / "other")
    other.take(tmp_path / "reward")
    assert found == json.loads((tmp_path / "reward" / "agreement.json").read_text())
    assert found["spearman"] == logged[-1] == pytest.approx(other.agreement()["spearman"], abs=1e-6)
    rows = other.train[:32]
    error = sum(row.target - score for row, (score,) in zip(rows, other.predict(rows), strict=True))
    assert error == pytest.approx(0, abs=1e-3)


def test_nothing_of_a_finished_stage_is_left_in_memory(
    world: World, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation might not fit beside it."""
    made: list[weakref.ref[PPO]] = []
    left: list[PPO | None] = []

    def stage(*args: Any) -> PPO:
        ppo = PPO(*args)
        made.append(weakref.ref(ppo))
        return ppo

    def evaluation(*_: Any) -> dict[str, Any]:
        left.extend(ref() for ref in made)
        return {}

    monkeypatch.setitem(STAGES, "ppo", stage)
    monkeypatch.setattr("ppolite.stages.run.evaluate_run", evaluation)
    run_recipe(world.recipe(ppo__steps=1), trained)
    assert left == [None]


def test_a_loop_of_ones_own_learns_of_it(world: World, trained: Path) -> None:
    """Without a session nothing goes back, so that no later step would learn anything."""
    ppo = PPO(world.recipe(**STEPS), trained, scorer=Wants(goods))
    rollouts, scores = ppo.next_round()
    ppo.step(rollouts, scores)
    with torch.no_grad():
        ppo.roles.policy.trained()[0].fill_(math.nan)
    for _ in range(2):
        with pytest.raises(UserError, match="4 updates in a row had to be skipped, since a loss or gradient"):
            ppo.step(rollouts, scores)


def test_a_held_out_loss_that_is_not_finite(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft = SFT(world.recipe(**EVERY), tmp_path)
    original = sft.loss
    monkeypatch.setattr(
        sft, "loss", lambda rows, *, backward: original(rows, backward=True) if backward else math.nan
    )
    assert sft.run() == {"loss_before": None, "loss_after": None}
    assert [row["loss/heldout"] for row in read_metrics(tmp_path) if "loss/heldout" in row] == [None] * 3


def test_a_penalty_whose_kl_is_not_finite_stays(
    world: World, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppolite.stages.update.update_kl", lambda *_: torch.tensor(math.nan))
    ppo = PPO(world.recipe(**STEPS, ppo__objective="kl"), trained, scorer=Wants(goods))
    assert ppo.step(*ppo.next_round())["penalty/beta"] == ppo.updates.penalty.beta == 1.0


# ---- alarms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_alarm", ["log", "stop", "restore"])
def test_an_alarm_has_consequences(
    on_alarm: str, world: World, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From step 2 on the SFT model is too far away; the best policy within 1e-6 nats is that of the start."""
    far = {"watch__patience": 1, "watch__kl": 0.1, "ppo__max_kl": 1e-6, "watch__on_alarm": on_alarm}
    ppo = PPO(world.recipe(**STEPS | far), trained, scorer=Wants(goods))
    result = ppo.run()
    rows = {row["step"]: row for row in read_metrics(trained)}
    assert "step 2: alarm `kl`: KL to the SFT model (kl/ref_seq) is " in caplog.text
    assert "alarms" not in rows[1]
    kl = [row["kl/ref_seq"] for row in rows.values() if "kl/ref_seq" in row]
    match on_alarm:
        case "log":
            assert [row.get("alarms") for row in rows.values()][2:] == [["kl"]] * 3
            assert result.get("stopped_at") is None
        case "stop":
            assert (max(rows), result["stopped_at"], rows[2]["alarms"]) == (2, 2, ["kl"])
        case "restore":
            assert "going on from the best policy, that of step 0" in caplog.text
            # Back at the start after step 2, so that step 3 finds the SFT model again.
            assert kl[2] == pytest.approx(0, abs=1e-4) != pytest.approx(kl[1], abs=1e-4)
            assert kl[3] > 1e-3


def test_checkpoints_are_removed_before_another_process_may_begin(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def finish(self: Checkpoints) -> None:
        with pytest.raises(UserError, match="another process is at work"), alone(tmp_path):
            pytest.fail("the folder was free")
        tried.append(self.folder)

    monkeypatch.setattr(Checkpoints, "finish", finish)
    run_stage("sft", world.recipe(), tmp_path)
    assert tried == [tmp_path / "checkpoints" / "sft"]


# ---- memory ------------------------------------------------------------------------------------------------


def test_less_at_once_where_memory_does_not_suffice() -> None:
    """The allocator's own error, under a real limit of the address space."""
    code = """
import resource, torch, logging
from ppolite.stages.learner import Fitting
logging.basicConfig()
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
fitting, cleared = Fitting(4096), []
made = fitting.run(lambda: torch.ones(fitting.tokens, 2**16).shape, lambda: cleared.append(fitting.tokens))
print(made[0], fitting.tokens, cleared)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    rows, tokens, cleared = done.stdout.split(maxsplit=2)
    assert rows == tokens == "512", done.stderr
    assert cleared.strip() == "[4096, 2048, 1024]"
    assert done.stderr.count("did not fit into memory; going on with at most 2048 tokens") == 1


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="size"):
        Fitting(8).run(lambda: torch.ones(2) @ torch.ones(3), lambda: None)
    with pytest.raises(MemoryError):
        Fitting(1).run(lambda: (_ for _ in ()).throw(MemoryError), lambda: None)


def test_a_budget_that_was_halved_is_kept(world: World, tmp_path: Path) -> None:
    rm = RewardModel(world.recipe(sft=None), tmp_path)
    rm.fitting.tokens = 40
    other = RewardModel(world.recipe(sft=None), tmp_path)
    other.restore(rm.state())
    assert other.fitting.tokens == 40
    told = RewardModel(world.recipe(sft=None, reward__optim__micro_batch_tokens=64), tmp_path)
    told.restore(rm.state())
    assert told.fitting.tokens == 64  # the recipe says another one since
