"""Experience by hand: where the reward lands, what is subtracted, what the advantages are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import tiny

from ppolite.config import PPO, Data, Optim
from ppolite.models.roles import Norm, Roles, build_roles
from ppolite.models.trunk import Trunk
from ppolite.rollout.experience import make_experience, over_batches, sequences, shaped_scores, token_rewards
from ppolite.rollout.local import LocalGenerator
from ppolite.rollout.score import TrunkScorer
from ppolite.types import Prompt, Rollout, Sampling, UserError

STOPS = frozenset({tiny.END, 11, 12, 13, 14, 15})
BETA = 0.3
NORM = Norm(mean=0.5, std=2.0, offset=0.25)


def config(**changes: Any) -> PPO:
    return PPO(prompts=Data(path="unused"), rollouts=6, max_new_tokens=7, **changes)


def roles_of(kind: str = "layers", split: int = 2, name: str = "qwen2") -> Roles:
    model = tiny.model(name)
    reward: Any = tiny.classifier(model, changed_from=split)
    roles = build_roles(
        Trunk(model, split),
        tiny.train(kind),
        (reward, reward.score, NORM),  # type: ignore[arg-type]
    )
    with torch.no_grad():  # so that policy and reference differ
        stream = torch.Generator().manual_seed(1)
        for p in roles.policy.trained():
            p.add_(0.05 * torch.randn(p.shape, generator=stream))
    return roles


def rollouts_of(roles: Roles, temperature: float = 1.0) -> list[Rollout]:
    prompts, _ = tiny.rows(shared=3, n=6)
    maker = LocalGenerator(roles.policy, tiny.tokenizer(), STOPS)
    made = maker.generate([Prompt(text=tiny.words(p)) for p in prompts], Sampling(7, temperature), seed=2)
    assert {r.finish for r in made} == {"stop", "length"}
    return made


SCORES = [1.0, -2.0, 0.5, 4.0, 0.0, 2.5]


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Σ_k (γλ)^k δ_{t+k}, summed from the definition."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_every_number_of_a_round(kind: str) -> None:
    roles = roles_of(kind)
    made = rollouts_of(roles, 0.8)
    settings = config(
        temperature=0.8, gamma=0.97, lam=0.9, reward_scale=1.5, reward_clip=1.2, missing_eos_penalty=0.7
    )
    experience, seqs = make_experience(roles, made, SCORES, settings, BETA)
    plain = tiny.model("qwen2")
    advantages: list[float] = []
    for i, r in enumerate(made):
        n = len(r.response_ids)
        ref = tiny.logprobs(plain, r.prompt_ids, r.response_ids, 0.8).detach()
        old = experience.logprobs_BR[i, :n]
        torch.testing.assert_close(old, r.logprobs_R, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(experience.ref_logprobs_BR[i, :n], ref, rtol=1e-5, atol=1e-5)
        assert experience.mask_BR[i].tolist() == [t < n for t in range(experience.mask_BR.shape[1])]
        shaped = max(-1.2, min(1.2, 1.5 * (SCORES[i] - 0.5) / 2.0)) - (0.7 if r.finish == "length" else 0.0)
        rewards = [-BETA * float(o - f) for o, f in zip(old, ref, strict=True)]
        rewards[-1] += shaped
        assert experience.rewards_BR[i, :n].tolist() == pytest.approx(rewards, abs=1e-5)
        assert not experience.rewards_BR[i, n:].any()
        values = experience.values_BR[i, :n].tolist()
        by_hand = naive_gae(rewards, values, 0.97, 0.9)
        advantages += by_hand
        returns = [a + v for a, v in zip(by_hand, values, strict=True)]
        assert experience.returns_BR[i, :n].tolist() == pytest.approx(returns, abs=1e-4)
    mean = sum(advantages) / len(advantages)
    std = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(advantages))
    whitened = experience.advantages_BR[experience.mask_BR].tolist()
    assert whitened == pytest.approx([(a - mean) / std for a in advantages], abs=1e-4)
    assert not experience.advantages_BR[~experience.mask_BR].any()

    raw, _ = make_experience(
        roles, made, SCORES, settings.model_copy(update={"whiten_advantages": False}), BETA
    )
    assert raw.advantages_BR[raw.mask_BR].tolist() == pytest.approx(advantages, abs=1e-4)

    seen = experience.diagnostics
    log_ratio_BR = experience.logprobs_BR - experience.ref_logprobs_BR
    kl = [float(log_ratio_BR[i, : len(r.response_ids)].sum()) for i, r in enumerate(made)]
    assert seen["score/mean"] == 1.0
    assert seen["score/std"] == pytest.approx(math.sqrt(sum((s - 1.0) ** 2 for s in SCORES) / 6))
    assert seen["kl/ref_seq"] == pytest.approx(sum(kl) / 6, abs=1e-5)
    assert seen["length/mean"] == pytest.approx(sum(len(r.response_ids) for r in made) / 6)
    assert seen["length/cut_share"] == pytest.approx(sum(r.finish == "length" for r in made) / 6)
    assert seen["advantage/mean"] == pytest.approx(mean, abs=1e-5)
    assert seen["sampler/gap_max"] < 5e-5
    assert seen["sampler/gap_mean"] <= seen["sampler/gap_max"]
    assert seen["kl/ref_token_k3"] > 0
    assert seqs.h_BTD is not None


def test_entropy_is_a_mean_over_tokens() -> None:
    roles = roles_of()
    made = rollouts_of(roles)
    experience, _ = make_experience(roles, made, SCORES, config(), BETA)
    total, count = 0.0, 0
    trained: Any = tiny.model("qwen2")
    for i, layer in enumerate(roles.policy.layers):
        trained.base_model.layers[2 + i] = layer
    trained.base_model.norm = roles.policy.norm
    for r in made:
        ids = torch.tensor([[*r.prompt_ids, *r.response_ids]])
        with torch.no_grad():
            p = trained(input_ids=ids).logits[0, len(r.prompt_ids) - 1 : -1].double().softmax(-1)
        total -= float((p * p.log()).sum())
        count += len(r.response_ids)
    assert experience.diagnostics["policy/entropy"] == pytest.approx(total / count, abs=1e-5)


def test_a_leash_in_the_loss_is_not_in_the_reward() -> None:
    roles = roles_of()
    made = rollouts_of(roles)
    settings = config(kl={"where": "loss", "estimator": "k2"})
    experience, _ = make_experience(roles, made, SCORES, settings, BETA)
    assert int((experience.rewards_BR != 0).sum()) <= len(made)
    for i, r in enumerate(made):
        assert experience.rewards_BR[i, len(r.response_ids) - 1] == pytest.approx(
            (SCORES[i] - 0.5) / 2 - (r.finish == "length"), abs=1e-6
        )


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_micro_batches_change_nothing(name: str) -> None:
    roles = roles_of(name=name)
    made = rollouts_of(roles)
    whole, _ = make_experience(roles, made, SCORES, config(), BETA)
    for tokens in (1, 20, 45):
        small = config(optim=Optim(micro_batch_tokens=tokens))
        parts, _ = make_experience(roles, made, SCORES, small, BETA)
        for key in (
            "logprobs_BR",
            "ref_logprobs_BR",
            "values_BR",
            "rewards_BR",
            "advantages_BR",
            "returns_BR",
        ):
            torch.testing.assert_close(
                getattr(parts, key), getattr(whole, key), rtol=1e-4, atol=2e-5, msg=key
            )
        assert parts.diagnostics == pytest.approx(whole.diagnostics, abs=2e-5)


@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_the_trunk_s_scorer_gives_the_classifier_s_scores(kind: str) -> None:
    roles = roles_of(kind)
    made = rollouts_of(roles)
    classifier: Any = tiny.classifier(tiny.model("qwen2"), changed_from=2)
    scores = TrunkScorer(roles, 30).score(made)
    for r, score in zip(made, scores, strict=True):
        with torch.no_grad():
            raw = classifier(input_ids=torch.tensor([[*r.prompt_ids, *r.response_ids]])).logits.item()
        assert score == pytest.approx(raw + 0.25, abs=1e-5)


def test_over_batches_keeps_the_order() -> None:
    roles = roles_of()
    seqs = sequences(roles, rollouts_of(roles), 64)
    columns_BR = over_batches(seqs, 20, lambda part: part.predictors_BR() * part.mask_BR)
    assert torch.equal(columns_BR, seqs.predictors_BR() * seqs.mask_BR)
    assert torch.equal(over_batches(seqs, 20, lambda part: part.starts_B), seqs.starts_B)


def test_shaping_by_hand() -> None:
    scores_B, cut_B = torch.tensor([1.0, -4.0, 0.25]), torch.tensor([False, True, True])
    shaped = shaped_scores(
        scores_B, cut_B, config(reward_scale=2.0, reward_clip=3.0, missing_eos_penalty=0.5)
    )
    assert shaped.tolist() == [2.0, -3.5, 0.0]  # the penalty comes after the clip
    mask_BR = torch.tensor([[True, True], [True, False], [True, True]])
    kl_BR = torch.tensor([[1.0, 2.0], [3.0, torch.nan], [0.0, 0.0]])
    assert token_rewards(shaped, kl_BR, mask_BR, 0.5).tolist() == [[-0.5, 1.0], [-5.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ([1.0], "scores: got 1 for 6 rollouts"),
        ([*SCORES, 1.0], "scores: got 7 for 6 rollouts"),
        ([1.0, math.nan, *SCORES[2:]], "scores: number 1 is nan; expected a finite number"),
        ([*SCORES[:5], math.inf], "scores: number 5 is inf; expected a finite number"),
        ([*SCORES[:5], "high"], "scores: number 5 is 'high'; expected a finite number"),
        ([None, *SCORES[1:]], "scores: number 0 is None; expected a finite number"),
    ],
)
def test_scores_that_are_none(scores: list[Any], sentence: str) -> None:
    roles = roles_of()
    with pytest.raises(UserError, match=sentence):
        make_experience(roles, rollouts_of(roles), scores, config(), BETA)


def test_the_bottom_runs_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = roles_of()
    made = rollouts_of(roles)
    runs: list[int] = []
    bottom = roles.trunk.bottom
    monkeypatch.setattr(
        roles.trunk, "bottom", lambda seqs, *told: runs.append(len(seqs)) or bottom(seqs, *told)
    )
    scores = TrunkScorer(roles, 64).score(made)
    make_experience(roles, made, scores, config(), BETA)
    assert runs == [6]
    again = TrunkScorer(roles, 64).score(made[::-1])
    assert runs == [6, 6]
    assert again == pytest.approx(scores[::-1], abs=1e-5)


@pytest.mark.parametrize("kind", ["step", "per_decision", "trajectory"])
def test_every_number_about_another_policys_rollouts(kind: str) -> None:
    """μ is the reference here, π_old the shaken policy; weights, effective sample size and KL by plain loops."""
    roles = roles_of()
    made = rollouts_of(roles)
    plain = tiny.model("qwen2")
    for r in made:
        r.trainer_logprobs_R = tiny.logprobs(plain, r.prompt_ids, r.response_ids).detach()
    settings = config(behaviour="stale", weight_kind=kind, weight_cap=1.2)
    experience, _ = make_experience(roles, made, SCORES, settings, BETA)
    assert experience.weights_BR is not None
    uncut: list[list[float]] = []
    for i, r in enumerate(made):
        assert r.trainer_logprobs_R is not None
        old = experience.logprobs_BR[i, : len(r.response_ids)].double()
        steps = [math.exp(float(o - m)) for o, m in zip(old, r.trainer_logprobs_R, strict=True)]
        so_far = [math.prod(steps[: t + 1]) for t in range(len(steps))]
        uncut.append({"step": steps, "per_decision": so_far, "trajectory": [so_far[-1]] * len(steps)}[kind])
        found = experience.weights_BR[i, : len(steps)].tolist()
        assert found == pytest.approx([min(w, 1.2) for w in uncut[i]], rel=1e-4)
    tokens = [w for row in uncut for w in row]
    samples = [row[0] for row in uncut] if kind == "trajectory" else tokens
    seen = experience.diagnostics
    share = sum(samples) ** 2 / sum(w * w for w in samples) / len(samples)
    assert seen["ess/share"] == pytest.approx(share, rel=1e-4)
    assert 0 < share < 0.99
    assert seen["weight/mean"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-4)
    assert seen["weight/max"] == pytest.approx(max(tokens), rel=1e-4)
    assert seen["weight/capped_share"] == pytest.approx(sum(w > 1.2 for w in tokens) / len(tokens))
    k1, k3_mu = 0.0, 0.0
    for i, row in enumerate(uncut):
        for t, w in enumerate(row):
            x = float(experience.logprobs_BR[i, t] - experience.ref_logprobs_BR[i, t])
            k1 += w * x
            k3_mu += math.exp(x) - 1 - x
    assert seen["kl/ref_seq"] == pytest.approx(k1 / len(made), rel=1e-3)
    assert seen["kl/behaviour_token"] == pytest.approx(k3_mu / len(tokens), rel=1e-3)


def test_fresh_rollouts_need_no_weights() -> None:
    roles = roles_of()
    experience, _ = make_experience(roles, rollouts_of(roles), SCORES, config(), BETA)
    assert experience.weights_BR is None
    assert torch.equal(experience.behaviour_logprobs_BR, experience.logprobs_BR)
    assert not {"ess/share", "weight/max", "kl/behaviour_token"} & experience.diagnostics.keys()
