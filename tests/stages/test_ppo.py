"""PPO's meaning in numbers: against a naive float64 PPO over plain HF models, and by what it achieves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.stages.kit import Wants, goods, outcome, weights
from tests.world import World
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppolite.data.film import judge_text
from ppolite.rollout.experience import make_experience, policy_logprobs
from ppolite.stages.ppo import PPO
from ppolite.stages.run import run_stage
from ppolite.stages.seeds import derive_seed
from ppolite.types import Prompt, Rollout, UserError

# ---- against a naive PPO ---------------------------------------------------------------------------------


@dataclass
class Naive:
    """PPO-clip with GAE on whole models, a response at a time, in float64; plain loops, nothing shared."""

    policy: nn.Module
    reference: nn.Module
    critic: nn.Module
    norm: dict[str, float]
    beta: float = 0.05
    clip: float = 0.2
    value_clip: float = 0.2
    lam: float = 0.95
    penalty: float = 1.0
    old: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    """For each rollout: log-probs, values, advantages, returns."""

    def logprobs(self, model: Any, r: Rollout) -> Tensor:
        ids = torch.tensor([r.prompt_ids + r.response_ids])
        logits = model(ids).logits[0, len(r.prompt_ids) - 1 : -1]
        return torch.stack([row.log_softmax(-1)[t] for row, t in zip(logits, r.response_ids, strict=True)])

    def values(self, r: Rollout) -> Tensor:
        critic: Any = self.critic
        ids = torch.tensor([r.prompt_ids + r.response_ids])
        hidden = critic.model(ids).last_hidden_state[0, len(r.prompt_ids) - 1 : -1]
        raw = critic.score(hidden)[:, 0]
        return (raw + self.norm["offset"] - self.norm["mean"]) / self.norm["std"]

    @torch.no_grad()
    def look(self, rollouts: list[Rollout], scores: list[float]) -> None:
        """GAE by its definition as a sum, then whitening over all tokens."""
        made = []
        for r, score in zip(rollouts, scores, strict=True):
            logp, ref, V = self.logprobs(self.policy, r), self.logprobs(self.reference, r), self.values(r)
            reward = -self.beta * (logp - ref)
            reward[-1] += (score - self.norm["mean"]) / self.norm["std"]
            reward[-1] -= self.penalty if r.finish == "length" else 0
            ahead = torch.cat([V[1:], V.new_zeros(1)])
            delta = reward + ahead - V
            n = len(delta)
            adv = torch.stack([sum(self.lam**k * delta[t + k] for k in range(n - t)) for t in range(n)])  # type: ignore[arg-type]
            made.append((logp, V, adv, adv + V))
        everything = torch.cat([adv for _, _, adv, _ in made])
        mean, std = everything.mean(), everything.var(correction=0).add(1e-8).sqrt()
        self.old = [(logp, V, (adv - mean) / std, returns) for logp, V, adv, returns in made]

    def losses(self, rollouts: list[Rollout], rows: list[int]) -> tuple[Tensor, Tensor]:
        """Policy and value loss of a minibatch: means over its tokens."""
        policy, value = [], []
        for i in rows:
            old, V_old, adv, returns = self.old[i]
            ratio = (self.logprobs(self.policy, rollouts[i]) - old).exp()
            V = self.values(rollouts[i])
            for t in range(len(adv)):
                cut = min(max(float(ratio[t].detach()), 1 - self.clip), 1 + self.clip)
                surrogate = ratio[t] * adv[t]
                policy.append(-(surrogate if surrogate <= cut * adv[t] else cut * adv[t]))
                near = V_old[t] + (V[t] - V_old[t]).clamp(-self.value_clip, self.value_clip)
                value.append(0.5 * torch.maximum((V[t] - returns[t]) ** 2, (near - returns[t]) ** 2))
        return torch.stack(policy).mean(), torch.stack(value).mean()


def shake(*pairs: tuple[nn.Parameter, nn.Parameter]) -> None:
    """The same small noise on both, so that ratios differ from 1 and some are clipped."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for ours, theirs in pairs:
            step = 0.03 * torch.randn(ours.shape, generator=noise)
            ours.add_(step)
            theirs.add_(step.to(theirs.dtype))


@pytest.mark.parametrize("budget", [4096, 40])
@pytest.mark.parametrize("split", [0, 1])
def test_one_minibatch_equals_a_naive_ppo(split: int, budget: int, world: World, trained: Path) -> None:
    recipe = world.recipe(trunk__split=split, ppo__optim__micro_batch_tokens=budget)
    ppo = PPO(recipe, trained)
    models = [AutoModelForCausalLM.from_pretrained(trained / "sft").double() for _ in range(2)]
    critic = AutoModelForSequenceClassification.from_pretrained(trained / "reward").double()
    naive = Naive(models[0], models[1], critic, critic.config.ppolite_norm)

    rollouts = ppo.generate(ppo.next_prompts())
    scores = [goods(r.text) - 0.1 * i for i, r in enumerate(rollouts)]
    experience, seqs = make_experience(ppo.roles, rollouts, scores, ppo.config, 0.05)
    naive.look(rollouts, scores)
    for i, (logp, V, adv, returns) in enumerate(naive.old):
        for ours, theirs in (
            (experience.logprobs_BR, logp), (experience.values_BR, V), (experience.advantages_BR, adv),
            (experience.returns_BR, returns),
        ):  # fmt: skip
            assert torch.allclose(ours[i, : len(theirs)].double(), theirs, atol=1e-4)

    layers = [(ppo.roles.policy.layers, models[0].model.layers[split:]),
              (ppo.roles.critic.layers, critic.model.layers[split:])]  # fmt: skip
    for ours, theirs in layers:
        shake(*zip(ours.parameters(), theirs.parameters(), strict=True))
    rows = [3, 0, 7, 8, 12]
    metrics = ppo.updates.minibatch(experience, seqs, rows, ppo.leash.beta)
    policy_loss, value_loss = naive.losses(rollouts, rows)
    assert metrics["policy/loss"] == pytest.approx(policy_loss.item(), abs=1e-5)
    assert metrics["value/loss"] == pytest.approx(value_loss.item(), rel=1e-4)
    assert 0 < metrics["policy/clip_fraction"] < 1
    for loss, (ours, theirs) in zip((policy_loss, value_loss), layers, strict=True):
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(theirs.parameters()))])
        found = torch.cat([p.grad.flatten() for p in ours.parameters() if p.grad is not None])
        assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


# ---- identities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "layers", "full"])
def test_without_learning_nothing_moves(kind: str, world: World, trained: Path) -> None:
    split = 0 if kind == "full" else 1
    ppo = PPO(
        world.recipe(train__kind=kind, trunk__split=split, ppo__optim__lr=0, ppo__critic__lr=0), trained
    )
    before = [weights(ppo.roles.policy).clone(), weights(ppo.roles.critic).clone()]
    rollouts = ppo.generate(ppo.next_prompts())
    metrics = ppo.step(rollouts, ppo.score(rollouts))
    assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["kl/old_token"] == pytest.approx(0, abs=1e-6)
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["kl/ref_seq"] == pytest.approx(0, abs=1e-4)
    assert metrics["sampler/gap_max"] < 1e-4
    # With ratio 1 the surrogate is the mean whitened advantage, which is 0.
    assert metrics["policy/loss"] == pytest.approx(0, abs=0.15)
    for old, new in zip(before, (weights(ppo.roles.policy), weights(ppo.roles.critic)), strict=True):
        assert torch.equal(old, new)
    looked = ppo.evaluate()
    assert looked["heldout/kl_ref_seq"] == pytest.approx(0, abs=1e-4)
    assert "heldout/judge" not in looked


def test_the_judge_looks_on_and_has_no_say(world: World, trained: Path) -> None:
    vader = pytest.importorskip("vaderSentiment.vaderSentiment", reason="the [demo] extra is not installed")
    ppo, judged = (PPO(world.recipe(evaluation__judge=judge), trained) for judge in ("none", "vader"))
    looked = judged.evaluate()
    opinion = looked.pop("heldout/judge")
    assert looked == ppo.evaluate()
    assert judged.heldout.best is not None
    assert judged.heldout.best.score == looked["heldout/score"]
    seed = derive_seed(judged.recipe.seed, "heldout")
    texts = [
        judge_text(r.prompt, r.text)
        for r in judged.generator.generate(judged.heldout.prompts, judged.config.sampling, seed=seed)
    ]
    rate = vader.SentimentIntensityAnalyzer().polarity_scores
    assert opinion == pytest.approx(sum(rate(text)["compound"] for text in texts) / len(texts))


def test_reference_and_reward_model_stay(world: World, trained: Path) -> None:
    ppo = PPO(world.recipe(train__kind="lora"), trained)
    rollouts = ppo.generate(ppo.next_prompts())
    scores = ppo.score(rollouts)
    first, seqs = make_experience(ppo.roles, rollouts, scores, ppo.config, 0.0)
    ppo.step(rollouts, scores)
    again, _ = make_experience(ppo.roles, rollouts, scores, ppo.config, 0.0)
    assert torch.equal(first.ref_logprobs_BR, again.ref_logprobs_BR)
    assert ppo.score(rollouts) == scores
    assert not torch.equal(first.logprobs_BR, again.logprobs_BR)
    assert not torch.equal(first.values_BR, again.values_BR)
    assert len(seqs) == len(rollouts)


def test_score_is_the_reward_models(world: World, trained: Path) -> None:
    ppo = PPO(world.recipe(), trained)
    model = AutoModelForSequenceClassification.from_pretrained(trained / "reward")
    rollouts = ppo.generate(ppo.next_prompts())
    for rollout, score in zip(rollouts, ppo.score(rollouts), strict=True):
        with torch.no_grad():
            raw = model(torch.tensor([rollout.prompt_ids + rollout.response_ids])).logits.item()
        assert score == pytest.approx(raw + model.config.ppolite_norm["offset"], abs=1e-4)


def test_a_step_makes_good_responses_likelier(world: World, tmp_path: Path) -> None:
    ppo = PPO(world.recipe(ppo__kl__beta=0, ppo__epochs=1, ppo__minibatches=1), tmp_path)
    rollouts = ppo.generate(ppo.next_prompts())
    half = len(rollouts) // 2
    experience, seqs = ppo.prepare(rollouts, [1.0] * half + [-1.0] * half)
    ppo.learn(experience, seqs)
    gained = torch.where(
        experience.mask_BR, policy_logprobs(ppo.roles, seqs, ppo.config) - experience.logprobs_BR, 0.0
    ).sum(1)
    ended = torch.tensor([r.finish == "stop" for r in rollouts])
    assert gained[:half].mean() > 0.01
    assert gained[half:].mean() < -0.01
    assert ended.any()


def test_minibatches_are_as_many_as_asked_for(world: World, trained: Path) -> None:
    ppo = PPO(world.recipe(ppo__rollouts=5, ppo__minibatches=4, ppo__epochs=3), trained)
    rollouts = ppo.generate(ppo.next_prompts())
    ppo.step(rollouts, ppo.score(rollouts))
    assert ppo.updates.policy.done == ppo.updates.critic.done == 12
    ppo.step(rollouts[:2], [0.0, 1.0])  # fewer than minibatches: from Python anything may come
    assert ppo.updates.policy.done == 18
    assert ppo.generator.generate([rollouts[0].prompt], ppo.config.sampling, seed=0)[0].version == 18


def test_prompts_of_a_round(world: World, trained: Path) -> None:
    ppo = PPO(world.recipe(ppo__samples_per_prompt=4), trained)
    prompts = ppo.next_prompts()
    assert [p.last for p in prompts] == [p.last for p in prompts[::4] for _ in range(4)]
    assert len({p.last for p in prompts}) == 4
    assert not {p.last for p in prompts} & {p.last for p in ppo.held}


@pytest.mark.parametrize(
    ("scores", "message"), [([1.0], "got 1 for 2 rollouts"), ([1.0, math.nan], "number 1 is nan")]
)
def test_scores_that_do_not_fit(scores: list[float], message: str, world: World, trained: Path) -> None:
    ppo = PPO(world.recipe(), trained)
    rollouts = ppo.generate(ppo.next_prompts()[:2])
    with pytest.raises(UserError, match=message):
        ppo.step(rollouts, scores)


def test_a_critic_that_broke_does_not_let_the_policy_step(world: World, trained: Path) -> None:
    ppo = PPO(world.recipe(), trained)
    before = [weights(ppo.roles.policy).clone(), weights(ppo.roles.critic).clone()]
    experience, seqs = ppo.prepare(*ppo.next_round())
    broken = replace(experience, returns_BR=experience.returns_BR * math.nan)
    metrics = ppo.learn(broken, seqs)
    assert metrics["update/skipped"] == ppo.recipe.faults.skips + 1  # then the round is given up
    assert "policy/loss" not in metrics
    assert all(p.grad is None for p in [*ppo.updates.policy.parameters, *ppo.updates.critic.parameters])
    for old, new in zip(before, (weights(ppo.roles.policy), weights(ppo.roles.critic)), strict=True):
        assert torch.equal(old, new)


def test_the_learning_rate_told_is_the_one_used(world: World, trained: Path) -> None:
    schedule = {"ppo__optim__lr": 1e-3, "ppo__optim__schedule": "linear", "ppo__optim__warmup": 0}
    ppo = PPO(world.recipe(**schedule, ppo__epochs=1, ppo__minibatches=1, ppo__steps=4), trained)
    rates = [ppo.step(*ppo.next_round())["lr/policy"] for _ in range(4)]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    twice = PPO(world.recipe(**schedule, ppo__epochs=1, ppo__minibatches=2, ppo__steps=2), trained)
    rates = [twice.step(*twice.next_round())["lr/policy"] for _ in range(2)]
    assert rates == pytest.approx([0.875e-3, 0.375e-3])  # the mean over the step's updates


def test_every_call_draws_anew(world: World, trained: Path) -> None:
    ppo = PPO(world.recipe(), trained)
    prompts = ppo.next_prompts()
    first, second = ppo.generate(prompts), ppo.generate(prompts)
    assert [r.response_ids for r in first] != [r.response_ids for r in second]
    again = PPO(world.recipe(), trained)
    assert [r.response_ids for r in again.generate(prompts)] == [r.response_ids for r in first]


# ---- what it achieves ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"train__kind": "layers"},
        {"train__kind": "lora"},
        {"ppo__objective": "kl"},
        {"ppo__objective": "a2c", "ppo__epochs": 1, "ppo__minibatches": 1},
        {"ppo__objective": "is", "ppo__weight_cap": 3.0},
        {"ppo__behaviour": "stale", "ppo__stale_steps": 2},
        {
            "ppo__objective": "is",
            "ppo__behaviour": "stale",
            "ppo__weight_kind": "per_decision",
            "ppo__weight_cap": 3.0,
        },
        {"ppo__kl__where": "loss", "ppo__kl__estimator": "k2"},
        {"roles": "separate", "trunk__split": 0},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_a_reward_of_ones_own_rises(changes: dict[str, Any], world: World, tmp_path: Path) -> None:
    recipe = world.recipe(
        ppo__rollouts=32,
        ppo__optim__lr=1e-2,
        ppo__critic__lr=1e-2,
        ppo__missing_eos_penalty=0,
        sft=None,
        **changes,
    )
    ppo = PPO(recipe, tmp_path, scorer=Wants(goods))
    history = []
    for _ in range(15):
        rollouts = ppo.generate(ppo.next_prompts())
        history.append(ppo.step(rollouts, ppo.score(rollouts))["score/mean"])
    assert sum(history[-3:]) / 3 > sum(history[:3]) / 3 + 1


def test_missing_ends_are_learned(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(ppo__rollouts=32, ppo__optim__lr=1e-2, ppo__missing_eos_penalty=2.0, sft=None)
    ppo = PPO(recipe, tmp_path, scorer=Wants(lambda text: 0.0))
    shares = []
    for _ in range(12):
        rollouts = ppo.generate(ppo.next_prompts())
        shares.append(ppo.step(rollouts, ppo.score(rollouts))["length/cut_share"])
    assert shares[-1] < shares[0] - 0.3


def test_adaptive_leash_pulls(world: World, tmp_path: Path) -> None:
    def final(**changes: Any) -> tuple[float, float]:
        recipe = world.recipe(ppo__rollouts=32, ppo__optim__lr=5e-3, sft=None, **changes)
        ppo = PPO(recipe, tmp_path, scorer=Wants(goods))
        row: dict[str, float] = {}
        for _ in range(12):
            rollouts = ppo.generate(ppo.next_prompts())
            row = ppo.step(rollouts, ppo.score(rollouts))
        return row["kl/ref_seq"], row["leash/beta"]

    free, _ = final(ppo__kl__beta=0.0)
    held, beta = final(ppo__kl__beta=0.1, ppo__kl__target=0.3, ppo__kl__horizon=10)
    assert held < free / 2
    assert beta > 0.1


# ---- the best policy -------------------------------------------------------------------------------------


def scripted(ppo: PPO, looks: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Replace what evaluation measures by (score, KL) from a list. Returns the weights at each look."""
    seen: list[Tensor] = []
    current = iter(looks)
    now = (0.0, 0.0)

    def score(rollouts: Sequence[Rollout]) -> list[float]:
        return [now[0]] * len(rollouts)

    original = ppo.evaluate

    def evaluate() -> dict[str, float]:
        nonlocal now
        now = next(current)
        seen.append(weights(ppo.roles.policy).clone())
        return original()

    monkeypatch.setattr(ppo, "evaluate", evaluate)
    monkeypatch.setattr(ppo, "score", score)
    monkeypatch.setattr(
        "ppolite.stages.heldout.distance", lambda roles, rollouts, config: [now[1]] * len(rollouts)
    )
    return seen


def test_the_best_policy_within_the_leash_is_kept(
    world: World, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ppo = PPO(world.recipe(ppo__steps=4, ppo__max_kl=5.0), trained)
    # Step 2 is the best of those within 5 nats, step 3 scores higher but is too far, step 4 is worse.
    seen = scripted(ppo, [(0, 0), (1, 2), (2, 4.9), (9, 5.1), (1.5, 3)], monkeypatch)
    result = ppo.run()
    assert result == {"best_step": 2, "heldout_score": 2.0}
    assert torch.equal(weights(ppo.roles.policy), seen[2])
    saved = load_file(trained / "policy" / "model.safetensors")
    sft = load_file(trained / "sft" / "model.safetensors")
    assert any(not torch.equal(saved[k], sft[k]) for k in sft)
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(saved[name], dict(ppo.roles.policy.layers[1].named_parameters())["mlp.up_proj.weight"])


@pytest.mark.parametrize("kind", ["lora", "layers"])
def test_of_the_best_policy_only_trained_weights_are_kept(kind: str, world: World, trained: Path) -> None:
    ppo = PPO(world.recipe(train__kind=kind), trained)
    ppo.evaluate()
    start = [p.detach().clone() for p in ppo.roles.policy.trained()]
    rollouts = ppo.generate(ppo.next_prompts())
    ppo.step(rollouts, [1.0 + i for i in range(len(rollouts))])
    assert ppo.heldout.best is not None
    kept = ppo.heldout.best.weights
    assert [p.shape for p in kept] == [p.shape for p in ppo.roles.policy.trained()]
    assert sum(p.numel() for p in kept) < sum(p.numel() for p in ppo.roles.policy.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(kept, ppo.roles.policy.trained(), strict=True))
    ppo.finish()
    assert all(torch.equal(a, b) for a, b in zip(start, ppo.roles.policy.trained(), strict=True))


def test_the_sft_model_is_kept_and_announced(
    world: World, trained: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ppo = PPO(world.recipe(ppo__max_kl=5.0), trained)
    scripted(ppo, [(1, 0), (0.5, 1), (3, 9)], monkeypatch)
    assert ppo.run()["best_step"] == 0
    assert "saving the SFT model. Raise max_kl or kl.beta, or train longer" in caplog.text
    saved, sft = (load_file(trained / name / "model.safetensors") for name in ("policy", "sft"))
    assert all(torch.equal(saved[k], sft[k]) for k in sft)


# ---- again and again -------------------------------------------------------------------------------------


def test_same_seed_same_run(world: World, finished_run: Path, tmp_path: Path) -> None:
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        folder.mkdir()
        for part in ("sft", "reward"):
            (folder / part).symlink_to(finished_run / part)
        run_stage("ppo", world.recipe(seed=seed), folder)
        made.append(outcome(folder))
    assert made[0] == made[1]
    assert made[0][0] != made[2][0]
    assert made[0][1] != made[2][1]


def test_plain_text_prompts(world: World, tmp_path: Path) -> None:
    ppo = PPO(world.recipe(ppo__prompts__plain=True, sft=None), tmp_path, scorer=Wants(goods))
    rollouts = ppo.generate(ppo.next_prompts())
    assert all(
        not r.prompt.messages and r.prompt_ids == ppo.opened.tokenizer.encode(r.prompt.text) for r in rollouts
    )
    assert ppo.generate([Prompt(text="film")])[0].text
