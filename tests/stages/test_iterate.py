"""Rounds of feedback on the tiny world: who is asked what, what is learned from, what is kept, what is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.world import World, taste, write_rows

from ppolite.config import Recipe, load_recipe
from ppolite.data.readers import read_preferences
from ppolite.data.split import prompt_key
from ppolite.obs.sinks import read_metrics
from ppolite.stages.evaluate import evaluate_run, finished
from ppolite.stages.iterate import Iteration
from ppolite.stages.opening import sft_folder
from ppolite.stages.rows import load_split
from ppolite.stages.run import run_recipe, run_stage
from ppolite.types import UserError

ROUNDS = {"rounds": 2, "by": "file", "prompts": 30, "candidates": 3, "held_out": 0.2}


def recipe_for(world: World, **changes: Any) -> Recipe:
    usual = {
        "reward__kind": "pairs",
        "reward__data": None,
        "ppo__steps": 3,
        "ppo__optim__lr": 1e-2,
        "ppo__rollouts": 32,
        "ppo__missing_eos_penalty": 0,
        "ppo__max_kl": 50.0,
        "iterate": ROUNDS,
    }
    return world.recipe(**(usual | changes))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rate(path: Path, judge: Callable[[str], float] = taste) -> None:
    """Fill in the scores as people with simple tastes would."""
    write_rows(path, [row | {"score": judge(row["response"])} for row in rows_of(path)])


def go_on(recipe: Recipe, run: Path) -> dict[str, Any]:
    """Iterate, scoring the file of each round when it waits."""
    assert recipe.iterate is not None
    for number in range(1, recipe.iterate.rounds + 1):
        file = run / f"round-{number}" / "candidates.jsonl"
        if not file.exists():
            with pytest.raises(UserError, match=rf"{file}: \d+ of 90 candidates wait for a score"):
                Iteration(recipe, run).run()
            rate(file)
    return Iteration(recipe, run).run()


def fresh(finished_run: Path, folder: Path) -> Path:
    """A run folder with the SFT model alone."""
    folder.mkdir(parents=True)
    (folder / "sft").symlink_to(finished_run / "sft")
    return folder


@pytest.fixture(scope="module", params=["layers", "lora"])
def done(
    request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    """Two rounds, finished. To be read, or copied; never changed."""
    run = tmp_path_factory.mktemp("rounds") / "run"
    recipe = recipe_for(world, train__kind=request.param)
    go_on(recipe, run)
    return recipe, run


@pytest.fixture(scope="module")
def layers(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """One round, finished."""
    run = tmp_path_factory.mktemp("round") / "run"
    recipe = recipe_for(world, iterate__rounds=1)
    go_on(recipe, run)
    return recipe, run


@pytest.fixture
def copied(layers: tuple[Recipe, Path], tmp_path: Path) -> tuple[Recipe, Path]:
    return layers[0], Path(shutil.copytree(layers[1], tmp_path / "run"))


def stamps(run: Path) -> dict[str, int]:
    wanted = ("candidates.jsonl", "model.safetensors", "eval.json", "rounds.json")
    return {str(p.relative_to(run)): p.stat().st_mtime_ns for p in run.rglob("*") if p.name in wanted}


def heldout(folder: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in read_metrics(folder) if row["stage"] == "ppo"}


# ---- two rounds ------------------------------------------------------------------------------------------


def test_candidates_are_the_last_policys_on_new_prompts(done: tuple[Recipe, Path], world: World) -> None:
    recipe, run = done
    assert recipe.ppo is not None
    _, held = load_split(recipe.ppo.prompts, "prompts", recipe.seed)
    first, second = (rows_of(run / f"round-{n}" / "candidates.jsonl") for n in (1, 2))
    assert len(first) == len(second) == 90
    assert {row["model"] for row in first} == {str(run / "sft")}
    assert {row["model"] for row in second} == {str(run / "round-1" / "policy")}
    prompts = [{row["prompt"][-1]["content"] for row in rows} for rows in (first, second)]
    assert [len(p) for p in prompts] == [30, 30]
    assert not prompts[0] & prompts[1]
    assert not (prompts[0] | prompts[1]) & {p.last for p in held}


def test_the_reward_model_learns_from_all_comparisons_so_far(done: tuple[Recipe, Path]) -> None:
    _, run = done
    expected: set[tuple[str, str, str]] = set()
    for n in (1, 2):
        rows = rows_of(run / f"round-{n}" / "candidates.jsonl")
        for a, b in combinations(rows, 2):
            same = a["prompt"] == b["prompt"] and a["response"].strip() and b["response"].strip()
            if same and taste(a["response"]) != taste(b["response"]):
                best, worst = sorted((a, b), key=lambda row: -row["score"])
                expected.add((best["prompt"][-1]["content"], best["response"], worst["response"]))
        made = rows_of(run / f"round-{n}" / "comparisons.jsonl")
        assert {(r["prompt"][-1]["content"], r["chosen"], r["rejected"]) for r in made} == expected
        assert {r["origin"] for r in made} == {f"round {k}" for k in range(1, n + 1)}
        agreement = json.loads((run / f"round-{n}" / "reward" / "agreement.json").read_text())
        parts = agreement["by_origin"]
        assert set(parts) == {f"round {k}" for k in range(1, n + 1)}
        assert agreement["held_out"] == sum(count for _, count in parts.values())
        whole = sum(right * count for right, count in parts.values()) / agreement["held_out"]
        assert agreement["pair_accuracy"] == pytest.approx(whole)
        assert agreement["pair_accuracy"] > 0.6


def test_held_out_comparisons_are_of_other_prompts(done: tuple[Recipe, Path]) -> None:
    recipe, run = done
    assert recipe.ppo is not None
    ours = load_recipe(run / "round-2" / "recipe.yaml")
    assert ours.reward is not None
    train, held = load_split(ours.reward.source, "preferences", ours.seed)
    keys = [{prompt_key(row.prompt) for row in part} for part in (train, held)]
    assert not keys[0] & keys[1]
    # 20 % of the prompts are PPO's own; of the others, which candidates answer, a fifth: 12 of 60, more or less.
    assert ours.reward.source.held_out == pytest.approx(0.36)
    assert 5 <= len(keys[1]) <= 20


def test_ppo_starts_from_the_last_policy_and_is_tied_to_the_sft_model(done: tuple[Recipe, Path]) -> None:
    _, run = done
    one, two = heldout(run / "round-1"), heldout(run / "round-2")
    assert one[0]["heldout/kl_ref_seq"] == pytest.approx(0, abs=1e-6)
    assert one[1]["kl/ref_seq"] == pytest.approx(0, abs=1e-5)
    best = max(one.values(), key=lambda row: row["heldout/score"])
    assert best["step"] > 0
    assert two[0]["heldout/kl_ref_seq"] == best["heldout/kl_ref_seq"] > 0.01
    assert two[0]["heldout/length"] == best["heldout/length"]
    assert two[1]["kl/ref_seq"] > 0.01


def test_rounds_draw_other_samples(done: tuple[Recipe, Path]) -> None:
    recipes = [load_recipe(done[1] / f"round-{n}" / "recipe.yaml") for n in (1, 2)]
    seeds = [r.ppo.seed for r in recipes if r.ppo]
    assert seeds[0] is None
    assert seeds[1] is not None
    assert [r.seed for r in recipes] == [0, 0]


def test_side_by_side_agrees_with_the_rounds_own_evaluations(done: tuple[Recipe, Path]) -> None:
    _, run = done
    result = json.loads((run / "rounds.json").read_text())
    sft, one, two = result["policies"]
    looks = [json.loads((run / f"round-{n}" / "eval.json").read_text()) for n in (1, 2)]
    assert sft["score"] == pytest.approx(looks[1]["score_before"], abs=1e-5)
    assert two["score"] == pytest.approx(looks[1]["score_after"], abs=1e-5)
    assert [sft["length"], one["length"], two["length"]] == pytest.approx(
        [looks[0]["length_before"], looks[0]["length_after"], looks[1]["length_after"]]
    )
    assert [one["kl_ref_seq"], two["kl_ref_seq"]] == [look["kl_ref_seq"] for look in looks]
    assert one["own_score"] == [looks[0]["score_before"], looks[0]["score_after"]]
    low, high = two["score_gain_ci95"]
    assert low <= two["score"] - one["score"] <= high
    assert len(result["samples"][0]["answers"]) == 3
    assert result["samples"][0]["answers"][1] == looks[0]["samples"][0]["after"]
    for policy, n in ((sft, 1), (one, 2)):
        scores = [row["score"] for row in rows_of(run / f"round-{n}" / "candidates.jsonl")]
        assert policy["candidates_score"] == pytest.approx(sum(scores) / len(scores))
    assert one["candidates_score"] > sft["candidates_score"]
    assert result["scored_by"] == "people"
    assert "2 rounds of" in (run / "report.html").read_text()


def test_a_round_is_a_run_like_any_other(done: tuple[Recipe, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(done[1], tmp_path / "moved"))
    folder = run / "round-2"
    for name in ("recipe.yaml", "metrics.jsonl", "rollouts", "reward", "policy", "eval.json", "report.html"):
        assert (folder / name).exists()
    assert sft_folder(folder) == run / "sft"
    recipe = load_recipe(folder / "recipe.yaml")
    before = json.loads((folder / "eval.json").read_text())
    assert evaluate_run(recipe, folder) == before
    assert run_recipe(recipe, folder) == before  # all stages are there
    assert not (folder / "sft").exists()
    with pytest.raises(UserError, match=r"name one, for instance .*round-2"):
        finished(done[0], run)


# ---- again and again -------------------------------------------------------------------------------------


def test_what_is_finished_is_kept(done: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, run = done[0], Path(shutil.copytree(done[1], tmp_path / "run"))
    before, result = stamps(run), json.loads((run / "rounds.json").read_text())
    assert Iteration(recipe, run).run() == result
    assert stamps(run) == before
    first = load_file(run / "round-2" / "policy" / "model.safetensors")
    shutil.rmtree(run / "round-2" / "policy")
    assert Iteration(recipe, run).run()["policies"] == result["policies"]
    again = load_file(run / "round-2" / "policy" / "model.safetensors")
    assert all(first[name].equal(again[name]) for name in first)
    changed = {name for name, stamp in stamps(run).items() if before[name] != stamp}
    assert changed == {"round-2/policy/model.safetensors", "round-2/eval.json", "rounds.json"}


def test_rounds_may_be_raised_and_nothing_else(copied: tuple[Recipe, Path], world: World) -> None:
    recipe, run = copied
    before = stamps(run)

    def refused(**changes: Any) -> str:
        with pytest.raises(UserError, match="were made with other values of") as caught:
            Iteration(recipe_for(world, **({"iterate__rounds": 1} | changes)), run).run()
        return str(caught.value)

    assert "iterate.prompts;" in refused(iterate__prompts=31)
    assert "iterate.by;" in refused(iterate__by="person")
    assert "iterate.held_out, reward.epochs;" in refused(iterate__held_out=0.3, reward__epochs=4)
    assert "ppo.kl.beta;" in refused(ppo__kl__beta=0.2)
    assert "sft.epochs;" in refused(sft__epochs=2)
    more = recipe_for(world, iterate__rounds=2, ppo__min_rm_accuracy=0.1)
    with pytest.raises(UserError, match=r"round-2/candidates.jsonl: \d\d of 90 candidates wait for a score"):
        Iteration(more, run).run()
    assert {k: v for k, v in stamps(run).items() if k in before} == before
    assert load_recipe(run / "recipe.yaml").iterate == more.iterate
    with pytest.raises(UserError, match=r"2 rounds are there, more than iterate.rounds \(1\)"):
        Iteration(recipe, run)
    # One stage of what the rounds are built on is not done anew with other settings either.
    with pytest.raises(UserError, match=r"sft.epochs"):
        run_stage("sft", recipe_for(world, sft__epochs=2), run)


def test_while_candidates_wait_other_stages_may_change_and_what_drew_them_may_not(
    world: World, finished_run: Path, tmp_path: Path
) -> None:
    run = fresh(finished_run, tmp_path / "run")
    with pytest.raises(UserError, match="wait for a score"):
        Iteration(recipe_for(world), run).run()
    with pytest.raises(UserError, match="wait for a score"):
        Iteration(recipe_for(world, reward__epochs=4, ppo__steps=1, iterate__held_out=0.3), run).run()
    for changes, key in (
        ({"ppo__prompts__held_out": 0.3}, "ppo.prompts.held_out"),
        ({"iterate__candidates": 2}, "iter"),
    ):
        with pytest.raises(UserError, match=rf"\(sft, candidates\) were made with other values of {key}"):
            Iteration(recipe_for(world, **changes), run).run()


def test_other_scores_than_were_learned_from_are_refused(copied: tuple[Recipe, Path]) -> None:
    recipe, run = copied
    rate(run / "round-1" / "candidates.jsonl", lambda text: -taste(text))
    with pytest.raises(UserError, match="put them back, or delete the rounds from this one on"):
        Iteration(recipe, run).run()
    rate(run / "round-1" / "candidates.jsonl")
    assert Iteration(recipe, run).run()["rounds"] == 1


# ---- who scores ------------------------------------------------------------------------------------------


def test_a_person_may_leave_and_come_back(
    world: World,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = fresh(finished_run, tmp_path / "run")
    recipe = recipe_for(world, iterate__rounds=1, iterate__by="person", ppo__min_rm_accuracy=0)
    file = run / "round-1" / "candidates.jsonl"
    monkeypatch.setattr("sys.stdin", io.StringIO("5\n7\nq\n"))
    with pytest.raises(UserError, match=r"wait for a score"):
        Iteration(recipe, run).run()
    drawn = rows_of(file)
    assert [row["score"] for row in drawn[:3]] == [5, 7, None]
    keys = [str(max(0, min(9, int(4 + taste(row["response"]))))) for row in drawn[2:-1]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*keys, "s"]) + "\n"))
    drawn[-1]["response"] = drawn[-1]["response"] or "film"
    write_rows(file, drawn)
    with pytest.raises(UserError, match=r": 1 of 90 candidates wait for a score.*--skip-unscored"):
        Iteration(recipe, run).run()
    assert [row["score"] for row in rows_of(file)] == [5, 7, *map(int, keys), None]
    assert Iteration(recipe, run).run(skip_unscored=True)["rounds"] == 1
    assert Iteration(recipe, run).run()["rounds"] == 1  # what was left out stays so
    assert "2 rated, 88 of 90 left" in capsys.readouterr().out


def test_a_round_that_nobody_has_scored_is_not_left_out(
    world: World, finished_run: Path, tmp_path: Path
) -> None:
    run = fresh(finished_run, tmp_path / "run")
    recipe = recipe_for(world, iterate__rounds=2, iterate__by="file", ppo__min_rm_accuracy=0)
    with pytest.raises(UserError, match="wait for a score"):
        Iteration(recipe, run).run()
    file = run / "round-1" / "candidates.jsonl"
    rate(file)
    write_rows(file, [row | {"score": None} if i == 0 else row for i, row in enumerate(rows_of(file))])
    with pytest.raises(UserError, match=r"round-2/candidates\.jsonl: \d+ of 90 candidates wait for a score"):
        Iteration(recipe, run).run(skip_unscored=True)
    assert (run / "round-1" / "policy").exists()
    assert not (run / "round-2" / "reward").exists()


def test_the_judge_is_named_as_a_stand_in_everywhere(
    world: World, finished_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vader = pytest.importorskip("vaderSentiment.vaderSentiment", reason="the [demo] extra is not installed")
    caplog.set_level("INFO", logger="ppolite")
    run = fresh(finished_run, tmp_path / "run")
    recipe = recipe_for(
        world, iterate__rounds=1, iterate__by="judge", evaluation__judge="vader", ppo__min_rm_accuracy=0
    )
    with pytest.raises(UserError, match="leave the option out"):
        Iteration(recipe, run).run(skip_unscored=True)
    result = Iteration(recipe, run).run()
    rows = rows_of(run / "round-1" / "candidates.jsonl")
    score = vader.SentimentIntensityAnalyzer().polarity_scores
    assert [row["score"] for row in rows] == [score(row["response"])["compound"] for row in rows]
    assert {row["scored_by"] for row in rows} == {"vader, a stand-in for people"} == {result["scored_by"]}
    assert "scored by vader, a stand-in for people" in caplog.text
    assert json.loads((run / "round-1" / "eval.json").read_text())["taught_by"] == "judge"
    for page in (run / "report.html", run / "round-1" / "report.html"):
        text = page.read_text(encoding="utf-8")
        assert "no independent witness" in text
        assert "stand-in for people" in text
        assert "independent judge" not in text
    assert result["policies"][1]["judge"] is not None


# ---- the recipe's own comparisons ------------------------------------------------------------------------


def test_own_pairs_are_joined_and_what_they_hold_out_stays_held_out(
    world: World, finished_run: Path, tmp_path: Path
) -> None:
    run = fresh(finished_run, tmp_path / "run")
    data = {"path": world.path("pairs"), "held_out": 0.3, "limit": 10}
    recipe = recipe_for(world, reward__data=data, iterate__rounds=1, reward__epochs=1, ppo__min_rm_accuracy=0)
    go_on(recipe, run)
    joined, _ = read_preferences(str(run / "round-1" / "comparisons.jsonl"))
    own = [row for row in joined if row.origin == "reward.data"]
    assert recipe.reward is not None
    _, held = load_split(recipe.reward.source, "preferences", recipe.seed)
    assert len(own) == 10 + len(held)
    ours = load_recipe(run / "round-1" / "recipe.yaml")
    assert ours.reward is not None
    assert ours.reward.source.held_out == pytest.approx(0.3 + 0.7 * 0.2)
    _, kept = load_split(ours.reward.source, "preferences", recipe.seed)
    texts = {(row.prompt.last, row.chosen) for row in kept}
    assert texts >= {(row.prompt.last, row.chosen) for row in held}
    agreement = json.loads((run / "round-1" / "reward" / "agreement.json").read_text())
    assert set(agreement["by_origin"]) == {"reward.data", "round 1"}


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"iterate": None}, "no section `iterate`"),
        ({"reward": None}, "no section `reward`"),
        ({"ppo": None}, "no section `ppo`"),
        ({"reward__kind": "scores"}, "reward.kind is scores, but rounds learn from comparing"),
        (
            {"ppo__rewards": [{"kind": "function", "function": "m:f"}]},
            "ppo.rewards has no entry of kind model",
        ),
        ({"ppo__start": "x"}, "ppo.start is for a run of its own"),
        ({"ppo__prompts__held_out": 20}, "ppo.prompts.held_out is 20; rounds hold out the same prompts"),
        ({"ppo__prompts__held_out": 0.0}, "others to judge it; hold out more"),
        ({"ppo__eval_prompts": 500}, "too few are left to judge it"),
    ],
)
def test_a_recipe_that_cannot_be_iterated(
    changes: dict[str, Any], said: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        Iteration(recipe_for(world, **changes), tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_too_few_comparisons(world: World, finished_run: Path, tmp_path: Path) -> None:
    run = fresh(finished_run, tmp_path / "run")
    with pytest.raises(UserError, match="wait for a score"):
        Iteration(recipe_for(world), run).run()
    rate(run / "round-1" / "candidates.jsonl", lambda text: 3)
    with pytest.raises(UserError, match="tell 0 pairs of answers to one prompt apart"):
        Iteration(recipe_for(world), run).run()
    (run / "round-1" / "candidates.jsonl").write_text(
        '{"prompt": "film", "response": "good", "score": "?"}\n'
    )
    with pytest.raises(UserError, match=r"candidates.jsonl row 1: 'score' is '\?'; give a number"):
        Iteration(recipe_for(world), run).run()


def test_other_commands_do_not_pass_over_the_rounds(world: World, finished_run: Path, tmp_path: Path) -> None:
    run = fresh(finished_run, tmp_path / "run")
    with pytest.raises(UserError, match="only `ppolite iterate` reads"):
        run_recipe(recipe_for(world), run)
    plain = recipe_for(world, iterate=None)
    for go in (lambda: run_recipe(plain, tmp_path / "new"), lambda: run_stage("reward", plain, run)):
        with pytest.raises(UserError, match=r"`reward\.data` is missing"):
            go()
    assert not (tmp_path / "new").exists()


def test_an_ordinary_run_may_be_called_like_a_round(world: World, tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    assert sft_folder(tmp_path / "round-1") == tmp_path / "round-1" / "sft"
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "round-1").mkdir()
    assert sft_folder(tmp_path / "round-1") == tmp_path / "sft"
    assert sft_folder(tmp_path / "round-x") == tmp_path / "round-x" / "sft"
    (tmp_path / "round-1" / "sft").mkdir()
    assert sft_folder(tmp_path / "round-1") == tmp_path / "round-1" / "sft"
