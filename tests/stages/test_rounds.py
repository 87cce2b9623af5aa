"""Who drew what: the versions of rollouts, the log-probs that stay with them, and samples used again and again."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.kit import Wants, goods, outcome, weights
from tests.world import World
from transformers import AutoModelForCausalLM

from ppolite.obs.sinks import read_metrics
from ppolite.rollout.local import LocalGenerator
from ppolite.stages.ppo import PPO
from ppolite.types import Rollout, UserError


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of prompts in every call of a generator."""
    calls: list[int] = []
    original = LocalGenerator.generate

    def generate(self: LocalGenerator, prompts: Sequence[Any], *args: Any, **kwargs: Any) -> list[Rollout]:
        calls.append(len(prompts))
        return original(self, prompts, *args, **kwargs)

    monkeypatch.setattr(LocalGenerator, "generate", generate)
    return calls


def plain_logprobs(model: Any, r: Rollout) -> torch.Tensor:
    ids = torch.tensor([r.prompt_ids + r.response_ids])
    logits = model(ids).logits[0, len(r.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, len(r.prompt_ids) :, None])[:, 0]


# ---- n steps ago -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "versions"), [(0, [0, 4, 8, 12, 16]), (1, [0, 0, 4, 8, 12]), (2, [0, 0, 0, 4, 8]), (9, [0] * 5)]
)
def test_rollouts_are_as_old_as_asked_for(n: int, versions: list[int], world: World, tmp_path: Path) -> None:
    recipe = world.recipe(ppo__behaviour="stale", ppo__stale_steps=n, sft=None)
    ppo = PPO(recipe, tmp_path, scorer=Wants(goods))
    seen, prompts = [], []
    for _ in range(5):
        rollouts, scores = ppo.next_round()
        assert scores == [goods(r.text) for r in rollouts]
        seen.append({r.version for r in rollouts})
        prompts += [r.prompt.last for r in rollouts]
        ppo.step(rollouts, scores)
    assert seen == [{v} for v in versions]
    assert ppo.rounds.drawn == (5 + n) * 16
    fresh = PPO(world.recipe(sft=None), tmp_path, scorer=Wants(goods))
    assert prompts == [p.last for _ in range(5) for p in fresh.next_prompts()]


def test_three_policies_are_three(world: World, trained: Path) -> None:
    """μ, π_old and π_ref are those of plain HF models saved at the time."""
    ppo = PPO(world.recipe(ppo__behaviour="stale", ppo__stale_steps=2, ppo__optim__lr=1e-2), trained)
    models: list[Any] = []
    for step in range(5):
        folder = ppo.save(trained / f"policy-{step}")
        models.append(AutoModelForCausalLM.from_pretrained(folder))
        experience, seqs = ppo.prepare(*ppo.next_round())
        ppo.learn(experience, seqs)
    reference = AutoModelForCausalLM.from_pretrained(trained / "sft")
    apart = 0.0
    for i, r in enumerate(experience.rollouts):
        n = len(r.response_ids)
        with torch.no_grad():
            mu, old, ref = (plain_logprobs(m, r) for m in (models[2], models[4], reference))
        for ours_BR, theirs in (
            (experience.behaviour_logprobs_BR, mu), (experience.logprobs_BR, old), (experience.ref_logprobs_BR, ref),
        ):  # fmt: skip
            torch.testing.assert_close(ours_BR[i, :n], theirs, rtol=1e-4, atol=1e-4)
        assert experience.weights_BR is not None
        torch.testing.assert_close(experience.weights_BR[i, :n], (old - mu).exp(), rtol=1e-3, atol=1e-3)
        apart = max(apart, float((old - mu).abs().max()))
    assert apart > 0.1
    # The sampler's numbers are compared with μ's, not with those of a policy that has moved on.
    assert experience.diagnostics["sampler/gap_max"] < 1e-4


@pytest.mark.parametrize("objective", ["clip", "kl", "is"])
def test_stale_by_0_is_fresh_to_the_bit(
    objective: str, world: World, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = []
    for changes in ({}, {"ppo__behaviour": "stale", "ppo__stale_steps": 0}):
        folder = tmp_path_factory.mktemp("run")
        for name in ("sft", "reward"):
            (folder / name).symlink_to((trained / name).resolve())
        PPO(world.recipe(ppo__objective=objective, **changes), folder).run()
        made.append(outcome(folder))
    assert made[0] == made[1]


def test_the_first_of_stale_rounds_are_fresh(world: World, trained: Path) -> None:
    """μ is still π_old: weights of 1, whoever computed them."""
    ppo = PPO(world.recipe(ppo__behaviour="stale", ppo__stale_steps=3), trained)
    experience, _ = ppo.prepare(*ppo.next_round())
    assert experience.weights_BR is not None
    assert (experience.weights_BR - 1).abs().max() < 1e-5
    assert experience.diagnostics["ess/share"] == pytest.approx(1, abs=1e-6)
    assert experience.diagnostics["kl/behaviour_token"] == pytest.approx(0, abs=1e-8)
    fresh, _ = PPO(world.recipe(), trained).prepare(experience.rollouts, [0.0] * len(experience.rollouts))
    assert fresh.weights_BR is not None  # rollouts know whose they are


# ---- the SFT model's samples -------------------------------------------------------------------------------

SFT = {"ppo__behaviour": "sft", "ppo__sft_samples": 48}
LEARNS = {"ppo__optim__lr": 5e-3, "ppo__critic__lr": 1e-2, "ppo__missing_eos_penalty": 0, "ppo__kl__beta": 0}


@pytest.mark.parametrize(
    "changes",
    [
        {"train__kind": "layers"},
        {"train__kind": "lora"},
        {"train__kind": "full", "trunk__split": 0},
        {"roles": "separate", "trunk__split": 0},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_samples_are_the_sft_models(
    changes: dict[str, Any], world: World, trained: Path, drawn: list[int]
) -> None:
    ppo = PPO(world.recipe(**SFT, **changes), trained)
    model = AutoModelForCausalLM.from_pretrained(trained / "sft")
    mine = ppo.generate(ppo.next_prompts())  # what the policy does before does not matter
    ppo.step(mine, [goods(r.text) for r in mine])
    rounds = [ppo.next_round() for _ in range(6)]
    assert drawn == [16, 48]
    assert ppo.rounds.drawn == 64
    for r in rounds[0][0]:
        assert (r.version, r.trainer_logprobs_R is None) == (0, False)
        with torch.no_grad():
            theirs = plain_logprobs(model, r)
        torch.testing.assert_close(r.logprobs_R, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(r.trainer_logprobs_R, theirs, rtol=1e-4, atol=1e-4)
    # Three rounds are a pass: each sample once, then all again in another order.
    first, second = (
        [(id(r), s) for rollouts, scores in rounds[k : k + 3] for r, s in zip(rollouts, scores, strict=True)]
        for k in (0, 3)
    )
    assert len(set(first)) == 48
    assert sorted(first) == sorted(second)
    assert first != second
    experience, _ = ppo.prepare(*rounds[0])
    torch.testing.assert_close(
        experience.behaviour_logprobs_BR, experience.ref_logprobs_BR, rtol=1e-4, atol=1e-4
    )


def test_each_sample_is_scored_once(world: World, tmp_path: Path) -> None:
    asked: list[str] = []

    def judge(text: str) -> float:
        asked.append(text)
        return goods(text)

    ppo = PPO(world.recipe(**SFT, sft=None), tmp_path, scorer=Wants(judge))
    for _ in range(7):
        ppo.step(*ppo.next_round())
    assert len(asked) == 48


def test_stored_samples_without_finite_scores_are_left_out(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = iter([math.nan] + 47 * [1.0])
    ppo = PPO(world.recipe(**SFT, sft=None), tmp_path, scorer=Wants(lambda _: next(calls)))
    seen = {id(r) for _ in range(4) for r in ppo.next_round()[0]}
    assert (len(seen), ppo.rounds.skipped) == (32, 16)
    assert "Going on without these 16" in caplog.text
    never = PPO(world.recipe(**SFT, sft=None), tmp_path, scorer=Wants(lambda _: math.nan))
    with pytest.raises(UserError, match="no part of the stored samples has finite scores"):
        never.next_round()
    at_once = world.recipe(**SFT, sft=None, faults__skips=0)
    with pytest.raises(UserError, match=r"1 times in a row \(faults.skips is 0\)"):
        PPO(at_once, tmp_path, scorer=Wants(lambda _: math.nan)).next_round()


def test_samples_in_the_run_folder_are_reused(
    world: World, trained: Path, drawn: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first = PPO(world.recipe(**SFT), trained)
    a = [first.next_round() for _ in range(3)]
    lines = (trained / "rollouts" / "sft.jsonl").read_text().splitlines()
    assert len(lines) == 49
    assert set(json.loads(lines[0])["origin"]) >= {"model", "prompts", "seed", "temperature", "top_p"}
    again = PPO(world.recipe(**SFT, ppo__objective="is", ppo__optim__lr=1e-4), trained)
    b = [again.next_round() for _ in range(3)]
    assert drawn == [48]
    assert (first.rounds.drawn, again.rounds.drawn) == (48, 0)
    for (rollouts, scores), (others, same) in zip(a, b, strict=True):
        assert scores == same
        for r, o in zip(rollouts, others, strict=True):
            assert (r.prompt, r.prompt_ids, r.response_ids, r.text, r.finish) == (
                o.prompt, o.prompt_ids, o.response_ids, o.text, o.finish,
            )  # fmt: skip
            assert torch.equal(r.logprobs_R, o.logprobs_R)
    assert not caplog.records

    PPO(world.recipe(**SFT, ppo__temperature=0.9), trained).next_round()
    assert "drawn with another temperature; drawing anew" in caplog.text
    assert drawn == [48, 48]
    (trained / "rollouts" / "sft.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"sft\.jsonl: cannot be read .* delete it"):
        PPO(world.recipe(**SFT), trained).next_round()


def test_samples_of_another_model_are_not(
    world: World, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    PPO(world.recipe(**SFT), trained).next_round()
    (trained / "sft").unlink()
    PPO(world.recipe(**SFT, sft=None), trained).next_round()
    assert "drawn with another model" in caplog.text


@pytest.mark.parametrize(
    "objective",
    [{"ppo__objective": "is", "ppo__optim__lr": 2e-3}, {"ppo__objective": "clip"}],
    ids=["is", "clip"],
)
def test_the_score_rises_on_old_samples_until_they_are_worn_out(
    objective: dict[str, Any],
    world: World,
    tmp_path: Path,
    drawn: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = world.recipe(
        **{**SFT, **LEARNS, **objective}, ppo__steps=60, ppo__ess_floor=0.4, ppo__max_kl=100, sft=None
    )
    ppo = PPO(recipe, tmp_path, scorer=Wants(goods))
    result = ppo.run()
    rows = read_metrics(tmp_path)
    assert result["stopped_at"] == rows[-1]["step"] < 60
    assert f"step {result['stopped_at']}: the samples are worth 0." in caplog.text
    # Nothing but looks at held-out prompts, and the doctor's round before the first step, was drawn beside the samples.
    assert sorted(drawn) == [8] * len(rows) + [12, 48]
    assert {row["samples/drawn"] for row in rows[1:]} == {48}
    shares = [row["ess/share"] for row in rows[1:]]
    assert shares[0] == pytest.approx(1, abs=1e-5)
    assert min(shares[:-1]) >= 0.4 > shares[-1]
    assert "policy/loss" not in rows[-1]
    assert rows[-2]["heldout/score"] > rows[0]["heldout/score"] + 0.7
    assert rows[-2]["kl/behaviour_token"] > rows[3]["kl/behaviour_token"] > 0
    assert (
        rows[-2]["kl/ref_seq"] > 0
    )  # of π_old on π_ref's samples: its weights keep it from turning negative
    assert result["best_step"] > 0


def test_worn_out_samples_are_replaced_by_the_policys(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(
        **SFT, **LEARNS, ppo__objective="is", ppo__steps=25, ppo__ess_floor=0.6, ppo__on_low_ess="draw",
        ppo__max_kl=100, ppo__eval_every=25, sft=None,
    )  # fmt: skip
    ppo = PPO(recipe, tmp_path, scorer=Wants(goods))
    assert "stopped_at" not in ppo.run()
    rows = read_metrics(tmp_path)[1:]
    assert len(rows) == 25
    changes = [row["step"] for row in rows if "ess/worn" in row]
    assert changes
    for row in rows:
        if row["step"] in changes:
            assert row["ess/worn"] < 0.6
            assert row["ess/share"] == pytest.approx(1, abs=1e-4)
            assert row["kl/ref_seq"] > 0.2  # μ is not the SFT model any more
        assert row["ess/share"] >= 0.6
    assert rows[-1]["samples/drawn"] == 48 * (1 + len(changes))
    rollouts, _ = ppo.next_round()
    assert {r.version for r in rollouts} == {4 * (changes[-1] - 1)}
    # A run that draws again gets further than one that stops.
    assert rows[-1]["heldout/score"] > 1.5


def test_the_same_seed_gives_the_same_run_on_old_samples(world: World, trained: Path) -> None:
    def one() -> tuple[list[dict[str, Any]], torch.Tensor]:
        ppo = PPO(world.recipe(**SFT, ppo__objective="is"), trained)
        rows = [ppo.step(*ppo.next_round()) for _ in range(3)]
        return [{k: v for k, v in row.items() if k != "samples/drawn"} for row in rows], weights(
            ppo.roles.policy
        )

    (rows, first), (same, second) = one(), one()  # drawn, then read
    assert rows == same
    assert torch.equal(first, second)
