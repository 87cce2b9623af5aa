"""`ppo.rewards` from the recipe to the report: what is learned, written, kept when a source fails."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tests.rollout.sources.kit import classifier
from tests.rollout.sources.server import serving
from tests.stages.kit import Wants, goods
from tests.world import GOOD, World, write_model
from transformers import AutoModelForSequenceClassification

from ppolite.obs.report import write_report
from ppolite.obs.table import before_after_table
from ppolite.stages.evaluate import evaluate_run
from ppolite.stages.ppo import PPO
from ppolite.stages.run import run_recipe, run_stage
from ppolite.types import Rollout, UserError

ROOT = Path(__file__).parents[2]
GSM8K = ROOT / "../shared/data/gsm8k_model_solutions.jsonl"
FUNCTION = """
calls = 0

def goods(responses, wanted):
    return [sum(word in good for word in r.split()) for r, good in zip(responses, wanted, strict=True)]

def breaks(responses):
    global calls
    calls += 1
    return [1.0] * len(responses) if calls < 3 else [None]

def length(responses):
    return [len(r.split()) for r in responses]
"""


@pytest.fixture
def asks(world: World, tmp_path: Path) -> dict[str, Any]:
    """Changes to the recipe: prompts with a column of wanted words; `rewards.py` holds the functions."""
    rows = [json.loads(line) for line in Path(world.path("prompts")).read_text().splitlines()]
    (tmp_path / "rewards.py").write_text(FUNCTION)
    return {
        "ppo__prompts__path": str(world.write("wanting", [row | {"wanted": GOOD} for row in rows])),
        "sft": None,
        "reward": None,
    }


def fun(tmp_path: Path, name: str, **more: Any) -> dict[str, Any]:
    return {"kind": "function", "function": f"{tmp_path / 'rewards.py'}:{name}", **more}


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_verifiable_reward_from_recipe_to_report(
    world: World, tmp_path: Path, asks: dict[str, Any]
) -> None:
    rules = {"kind": "length", "max": 5, "weight": 0.01, "name": "brief"}
    recipe = world.recipe(
        ppo__rewards=[fun(tmp_path, "goods"), rules], ppo__steps=10, ppo__rollouts=32, ppo__optim__lr=1e-2,
        ppo__missing_eos_penalty=0, ppo__max_kl=50, **asks,
    )  # fmt: skip
    run = tmp_path / "run"
    result = run_recipe(recipe, run)
    rows = rows_of(run)
    learned = [row["reward/goods"] for row in rows if "reward/goods" in row]
    assert statistics.mean(learned[-3:]) > statistics.mean(learned[:3]) + 0.3
    assert rows[0]["heldout/score"] == pytest.approx(
        rows[0]["heldout/reward/goods"] + 0.01 * rows[0]["heldout/reward/brief"], abs=1e-6
    )
    assert result["scored_by"] == ["goods", "brief"]
    for when in ("before", "after"):
        whole = result[f"reward/goods_{when}"] + 0.01 * result[f"reward/brief_{when}"]
        assert result[f"score_{when}"] == pytest.approx(whole, abs=1e-6)
    assert result["reward/goods_after"] > result["reward/goods_before"]
    page = write_report(run).read_text(encoding="utf-8")
    assert "… of it goods" in page
    assert "score of the reward model" not in page
    labels = [str(cell) for cell in before_after_table(result).renderables[0].columns[0].cells]  # type: ignore[union-attr]
    assert [label.strip() for label in labels[:3]] == ["score, trained against", "goods", "brief"]
    table = pq.read_table(sorted((run / "rollouts").glob("step-*.parquet"))[-1]).to_pylist()
    for row in table:
        assert row["reward/goods"] == goods(row["response"])
        assert row["score"] == pytest.approx(row["reward/goods"] + 0.01 * row["reward/brief"])


def test_naming_the_model_changes_nothing(world: World, finished_run: Path, tmp_path: Path) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    for name, rewards in (("default", []), ("named", [{"kind": "model"}])):
        run = tmp_path / name
        run.mkdir()
        for stage in ("sft", "reward"):
            (run / stage).symlink_to(finished_run / stage)
        run_stage("ppo", world.recipe(ppo__rewards=rewards), run)
        weights.append(load_file(run / "policy" / "model.safetensors"))
    for key, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][key], atol=1e-4), key


def test_model_and_penalty_by_hand(world: World, trained: Path) -> None:
    rewards = [{"kind": "model"}, {"kind": "length", "max": 2, "weight": 0.25}]
    plain = PPO(world.recipe(), trained)
    ppo = PPO(world.recipe(ppo__rewards=rewards), trained)
    norm = json.loads((trained / "reward" / "config.json").read_text())["ppolite_norm"]
    rollouts = plain.generate(plain.next_prompts())
    expected = [
        (people - norm["mean"]) / norm["std"] - 0.25 * max(len(r.response_ids) - 2, 0)
        for people, r in zip(plain.score(rollouts), rollouts, strict=True)
    ]
    assert ppo.score(rollouts) == pytest.approx(expected, abs=1e-5)
    experience, _ = ppo.prepare(rollouts, ppo.score(rollouts))
    assert experience.diagnostics["score/mean"] == pytest.approx(statistics.mean(expected), abs=1e-5)
    cut = [float(r.finish == "length") for r in rollouts]
    shaped = statistics.mean(expected) - statistics.mean(cut)
    assert experience.diagnostics["reward/shaped_mean"] == pytest.approx(shaped, abs=1e-5)


def test_units_are_measured_on_the_sft_model(world: World, trained: Path, tmp_path: Path) -> None:
    folder = classifier(tmp_path / "classifier", num_labels=1, initializer_range=0.5)
    rewards = [{"kind": "classifier", "model": str(folder), "dtype": "float32"}]
    recipe = world.recipe(ppo__rewards=rewards, ppo__unit_samples=24, ppo__max_kl=50)
    ppo = PPO(recipe, trained)
    rollouts = ppo.generate(ppo.next_prompts())
    scores = ppo.score(rollouts)
    kept = json.loads((trained / "reward_units.json").read_text())["units"]["classifier"]
    raw = [r.rewards["classifier"] for r in rollouts]
    assert scores == pytest.approx([(x - kept["shift"]) / kept["scale"] for x in raw])
    # The SFT model and the start of the policy are one: other answers of its have about the same mean and spread.
    assert statistics.mean(scores) == pytest.approx(0, abs=1)
    assert 0.4 < statistics.pstdev(scores) < 2.5
    ppo.run()
    before = (trained / "reward_units.json").read_bytes()
    result = evaluate_run(recipe, trained)
    assert (trained / "reward_units.json").read_bytes() == before
    whole = (result["reward/classifier_after"] - kept["shift"]) / kept["scale"]
    assert result["score_after"] == pytest.approx(whole, abs=1e-5)


def test_units_follow_the_function_that_was_edited(
    world: World, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = tmp_path / "edited.py"
    source = {"kind": "function", "function": f"{mine}:f", "shift": None, "scale": None}
    shifts: list[float] = []
    for text in ("len(r)", "len(r)", "100 + len(r)"):
        mine.write_text(f"def f(responses): return [{text} for r in responses]\n")
        ppo = PPO(world.recipe(ppo__rewards=[source]), trained)
        ppo.score(ppo.generate(ppo.next_prompts()))
        shifts.append(json.loads((trained / "reward_units.json").read_text())["units"]["f"]["shift"])
    assert shifts == pytest.approx([shifts[0], shifts[0], shifts[0] + 100])
    assert caplog.text.count("measuring anew") == 1


def test_scores_in_units_of_the_reward_model_are_announced(
    world: World, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> int:
        return caplog.text.count("scores that are not of PPO.score count in units of the reward model")

    ppo = PPO(world.recipe(), trained)
    ppo.step(*ppo.next_round())
    mine = ppo.generate(ppo.next_prompts())
    ppo.step(mine, ppo.score(mine))
    assert told() == 0
    for _ in range(2):
        mine = ppo.generate(ppo.next_prompts())
        ppo.step(mine, [goods(r.text) for r in mine])
    assert told() == 1
    own = PPO(world.recipe(), trained, scorer=Wants(goods))
    mine = own.generate(own.next_prompts())
    own.step(mine, [goods(r.text) for r in mine])
    assert told() == 1


def test_another_run_s_reward_model_is_a_classifier(world: World, trained: Path) -> None:
    """An ensemble: RUN/reward itself and the same weights as a classifier agree, and disagreement costs nothing."""
    judge = {"kind": "classifier", "model": str(trained / "reward"), "name": "other", "dtype": "float32"}
    norm = json.loads((trained / "reward" / "config.json").read_text())["ppolite_norm"]
    judge |= {"shift": norm["mean"] - norm["offset"], "scale": norm["std"]}
    rewards = [{"kind": "model"}, judge]
    recipe = world.recipe(ppo__rewards=rewards, ppo__disagreement=3.0)
    ppo = PPO(recipe, trained)
    rollouts = [r for r in ppo.generate(ppo.next_prompts()) if r.finish == "stop"]
    assert len(rollouts) > 3
    scores = ppo.score(rollouts)
    model = AutoModelForSequenceClassification.from_pretrained(trained / "reward").eval()
    with torch.no_grad():
        raw = [float(model(torch.tensor([r.prompt_ids + r.response_ids])).logits) for r in rollouts]
    expected = [(x + norm["offset"] - norm["mean"]) / norm["std"] for x in raw]
    assert scores == pytest.approx(expected, abs=1e-4)


def test_the_model_must_be_there(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(ppo__rewards=[{"kind": "model"}], sft=None, reward=None)
    with pytest.raises(UserError, match=r"ppo.rewards names kind model, but there is no reward model in it"):
        PPO(recipe, tmp_path)


# ---- faults ----------------------------------------------------------------------------------------------


def kept(run: Path, number: int = 1) -> list[dict[str, Any]]:
    text = (run / "rollouts" / f"unscored-{number}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_function_that_fails_loses_no_rollout(world: World, tmp_path: Path, asks: dict[str, Any]) -> None:
    """It fails for the second round of rollouts, which a later process has scored, and learns from."""
    run = tmp_path / "run"
    recipe = world.recipe(ppo__rewards=[fun(tmp_path, "breaks")], ppo__eval_every=2, **asks)
    message = (
        r"rewards\.py:breaks gave 1 numbers for 16 responses; .*\. The 16 responses .* in .*unscored-1\.jsonl"
    )
    with pytest.raises(UserError, match=message) as caught:
        run_stage("ppo", recipe, run)
    assert "\n" not in str(caught.value)
    rows = kept(run)
    assert len(rows) == 16
    for row in rows:
        assert row["columns"] == {"wanted": GOOD}
        assert row["messages"][-1]["content"] == row["prompt"]
        assert row["response"] or len(row["response_ids"]) == 1
        assert len(row["response_ids"]) == len(row["sampler_logprobs"])
    # The steps before it are on file.
    assert [row["step"] for row in rows_of(run)] == [0, 1]
    assert not (run / "policy").exists()
    run_stage("ppo", recipe, run)
    assert [row["step"] for row in rows_of(run)] == [0, 1, 2]
    learned = pq.read_table(run / "rollouts" / "step-00002.parquet").to_pylist()
    assert [row["response"] for row in learned] == [row["response"] for row in rows]


def test_a_server_that_stays_away_loses_no_rollout(
    world: World, tmp_path: Path, asks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret-token")
    with serving() as server:
        server.script = [
            lambda h, b: server.do(h, {"scores": [1.0] * len(b["responses"])}, b),
            (500, b"", {}),
        ]
        source = {
            "kind": "http", "url": server.url, "token_env": "JUDGE_TOKEN", "timeout": 0.5, "deadline": 0.6
        }  # fmt: skip
        recipe = world.recipe(ppo__rewards=[source], **asks)
        with pytest.raises(
            UserError, match=r"answered 500 .* given up after .*The 16 responses without a score"
        ):
            run_stage("ppo", recipe, tmp_path / "run")
    assert len(kept(tmp_path / "run")) == 16
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"s3cret-token" not in path.read_bytes(), path


class Fails:
    """A scorer of the Python API."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        raise self.error


def test_a_scorer_of_one_s_own_loses_none_either(world: World, tmp_path: Path, asks: dict[str, Any]) -> None:
    ppo = PPO(world.recipe(**asks), tmp_path, scorer=Fails(ZeroDivisionError("mine")))
    rollouts = ppo.generate(ppo.next_prompts())
    with pytest.raises(ZeroDivisionError, match="mine"):
        ppo.score(rollouts)
    assert [row["response"] for row in kept(tmp_path)] == [r.text for r in rollouts]
    ppo.scorer = Wants(lambda text: float("nan"))
    with pytest.raises(UserError, match=r"scores: number 0 is nan.*unscored-2\.jsonl"):
        ppo.score(rollouts)


def test_the_scorer_argument_wins(world: World, tmp_path: Path, asks: dict[str, Any]) -> None:
    recipe = world.recipe(ppo__rewards=[fun(tmp_path, "no_such_function")], **asks)
    ppo = PPO(recipe, tmp_path, scorer=Wants(goods))
    rollouts = ppo.generate(ppo.next_prompts())
    assert ppo.score(rollouts) == [goods(r.text) for r in rollouts]
    with pytest.raises(UserError, match="has no attribute 'no_such_function'"):
        PPO(recipe, tmp_path)


def test_old_samples_keep_what_the_sources_gave(world: World, tmp_path: Path, asks: dict[str, Any]) -> None:
    recipe = world.recipe(
        ppo__rewards=[fun(tmp_path, "length")],
        ppo__behaviour="sft",
        ppo__objective="is",
        ppo__sft_samples=32,
        **asks,
    )
    run_stage("ppo", recipe, tmp_path / "run")
    steps = [row for row in rows_of(tmp_path / "run") if "score/mean" in row]
    assert len(steps) == 2
    for row in steps:
        assert row["reward/length"] == pytest.approx(row["score/mean"], abs=1e-5)


# ---- the example -----------------------------------------------------------------------------------------


def test_the_example_agrees_with_gsm8k_s_labels(world: World, tmp_path: Path) -> None:
    """Through recipe, reader, process: right and wrong solutions of four models, as their makers labelled them."""
    if not GSM8K.exists():
        pytest.skip("../shared/data/gsm8k_model_solutions.jsonl is not beside this checkout")
    source = {"kind": "function", "function": f"{ROOT / 'examples' / 'gsm8k_reward.py'}:right_answer"}
    data = {"path": str(GSM8K), "columns": {"prompt": "question"}, "held_out": 0.1}
    recipe = world.recipe(
        ppo__rewards=[source],
        ppo__prompts=data,
        sft=None,
        reward=None,
        model=str(write_model(tmp_path / "model", context=2048)),
    )
    ppo = PPO(recipe, tmp_path)
    prompts = [prompt for _ in range(70) for prompt in ppo.next_prompts()]
    agree = count = right = 0
    for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
        told = [prompt.columns[model] for prompt in prompts]
        rollouts = [
            Rollout(prompt, [1], [2], told_one["solution"], torch.zeros(1), "stop")
            for prompt, told_one in zip(prompts, told, strict=True)
        ]
        scores = ppo.score(rollouts)
        agree += sum(bool(s) == t["is_correct"] for s, t in zip(scores, told, strict=True))
        right += sum(map(int, scores))
        count += len(scores)
    assert agree >= 0.995 * count
    assert 0.1 < right / count < 0.9
