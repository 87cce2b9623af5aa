"""Objectives against exact expectations: every response of a tiny model is written out, with its probability.

With all responses y in one batch, advantages scaled by μ(y) turn its sum into the expectation under μ, so that the
gradient can be compared with that of J = Σ_y π(y) R(y), which plain HF models give in float64.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.world import World
from torch import Tensor
from transformers import AutoModelForCausalLM

from ppolite.config import PPO as Config
from ppolite.config import Data
from ppolite.data.chat import encode_prompt
from ppolite.stages.objective import policy_loss, update_kl
from ppolite.stages.ppo import PPO
from ppolite.types import Experience, Prompt, Rollout

END = 2


@dataclasses.dataclass
class Exact:
    """All responses of at most two tokens to one prompt, by plain HF models in float64."""

    prompt: list[int]
    vocab: int

    @property
    def pairs(self) -> list[list[int]]:
        words = [a for a in range(self.vocab) if a != END]
        return [[END], *([a, b] for a in words for b in range(self.vocab))]

    def tables(self, model: Any) -> tuple[Tensor, Tensor]:
        """log π of the first token [V], and of the second after each first one [V, V]."""
        first = torch.tensor([self.prompt])
        second = torch.tensor([[*self.prompt, a] for a in range(self.vocab)])
        return (
            model(first).logits[0, -1].log_softmax(-1),
            model(second).logits[:, -1].log_softmax(-1),
        )

    def logprobs(self, model: Any) -> Tensor:
        """log π of each token, [B, 2], 0 where the first one ended it."""
        one_V, two_VV = self.tables(model)
        rows = [
            torch.stack([one_V[y[0]], two_VV[y[0], y[1]] if len(y) == 2 else one_V.new_zeros(())])
            for y in self.pairs
        ]
        return torch.stack(rows)


def shaken(model: Any, seed: int, size: float = 0.04) -> Any:
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.add_(size * torch.randn(p.shape, generator=stream, dtype=torch.float64))
    return model


def take(ppo: PPO, model: Any) -> None:
    """Give the policy the weights of a plain model."""
    with torch.no_grad():
        pairs = zip(ppo.roles.policy.layers.parameters(), model.model.layers.parameters(), strict=True)
        for ours, theirs in pairs:
            ours.copy_(theirs.to(ours.dtype))


def gradient(value: Tensor, model: Any) -> Tensor:
    grads = torch.autograd.grad(value, list(model.model.layers.parameters()))
    return torch.cat([g.flatten() for g in grads])


@pytest.fixture(scope="module")
def models(finished_run: Path) -> dict[str, Any]:
    """Behaviour policy, π_old and π: three different ones."""
    fresh = lambda: AutoModelForCausalLM.from_pretrained(finished_run / "sft").double()  # noqa: E731
    return {"mu": shaken(fresh(), 1), "old": shaken(fresh(), 2), "new": shaken(fresh(), 3)}


CASES = {
    "is-trajectory": {"objective": "is", "weight_kind": "trajectory"},
    "is-per_decision": {"objective": "is", "weight_kind": "per_decision"},
    "is-step": {"objective": "is"},
    "clip-trajectory": {"objective": "clip", "behaviour": "stale", "weight_kind": "trajectory"},
    "clip-per_decision": {"objective": "clip", "behaviour": "stale", "weight_kind": "per_decision"},
    "kl-trajectory": {"objective": "kl", "behaviour": "stale", "weight_kind": "trajectory"},
    "a2c": {"objective": "a2c", "epochs": 1, "minibatches": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_expected_gradient_is_the_exact_one(
    name: str, models: dict[str, Any], world: World, finished_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "sft").symlink_to(finished_run / "sft")
    changes = {f"ppo__{k}": v for k, v in CASES[name].items()}
    recipe = world.recipe(
        trunk__split=0, reward=None, ppo__critic_init="zero", ppo__whiten_advantages=False, **changes
    )
    ppo = PPO(recipe, tmp_path)
    prompt = Prompt(messages=({"role": "user", "content": "film was"},))
    exact = Exact(encode_prompt(ppo.opened.tokenizer, prompt), ppo.opened.model.config.vocab_size)
    pairs = exact.pairs
    mask_BR = torch.tensor([[True, len(y) == 2] for y in pairs])
    reward_B = torch.randn(len(pairs), generator=torch.Generator().manual_seed(5)).double()

    # `clip` and `kl` have ratio 1 at the start of an update: there π is π_old. A2C's μ is π itself.
    now = models["new" if CASES[name]["objective"] == "is" else "old"]
    mu = now if name == "a2c" else models["mu"]
    with torch.no_grad():
        mu_BR, old_BR = exact.logprobs(mu), exact.logprobs(models["old"])
    pi_B = exact.logprobs(now).sum(1).exp()
    assert float(pi_B.detach().sum()) == pytest.approx(1, abs=1e-9)
    assert name == "a2c" or float((old_BR - mu_BR).abs().max()) > 0.3

    value_BR = reward_B[:, None].expand(-1, 2)
    wanted = (pi_B * reward_B).sum()
    if CASES[name].get("weight_kind", "step") != "trajectory" and name != "a2c":
        # Weights up to a token want the value of what follows under π: Q(a) of the first, R of the second.
        one_V, two_VV = exact.tables(now)
        followed = {a: [i for i, y in enumerate(pairs) if y[0] == a] for a in range(exact.vocab)}
        q_V = torch.stack(
            [
                reward_B[rows[0]] if a == END else (two_VV[a].detach().exp() * reward_B[rows]).sum()
                for a, rows in followed.items()
            ]
        )
        value_BR = torch.stack([q_V[[y[0] for y in pairs]], reward_B], 1)
        if name == "is-step":
            # The state is not corrected: first tokens come from μ when the second is judged.
            second = torch.stack(
                [
                    mu_BR[i, 0].exp() * two_VV[y[0], y[1]].exp() * reward_B[i]
                    for i, y in enumerate(pairs)
                    if len(y) == 2
                ]
            )
            wanted = (one_V.exp() * q_V).sum() + second.sum()

    rollouts = [
        Rollout(prompt, exact.prompt, y, "", mu_BR[i, : len(y)].float(), "stop" if y[-1] == END else "length")
        for i, y in enumerate(pairs)
    ]
    if name != "a2c":
        for i, r in enumerate(rollouts):
            r.trainer_logprobs_R = mu_BR[i, : len(r.response_ids)].float()
    take(ppo, models["old"])
    experience, seqs = ppo.prepare(rollouts, [0.0] * len(rollouts))
    assert torch.allclose(experience.logprobs_BR.double(), old_BR, atol=1e-4)
    assert torch.allclose(experience.behaviour_logprobs_BR.double(), mu_BR, atol=1e-4)
    weighted_BR = mu_BR.sum(1).exp()[:, None] * value_BR * mask_BR.sum()
    experience = dataclasses.replace(experience, advantages_BR=weighted_BR.float())
    take(ppo, now)
    metrics = ppo.updates.minibatch(experience, seqs, list(range(len(pairs))), 0.0)

    expected = -gradient(wanted, now)
    found = torch.cat([p.grad.flatten() for p in ppo.roles.policy.layers.parameters() if p.grad is not None])
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
    assert ("weight/max" in metrics) == (CASES[name]["objective"] == "is")


# ---- by hand -----------------------------------------------------------------------------------------------


def known(**changes: Any) -> Experience:
    """One response of two tokens and one of one token."""
    tensors: dict[str, Any] = {
        "mask_BR": torch.tensor([[True, True], [True, False]]),
        "logprobs_BR": torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]),
        "behaviour_logprobs_BR": torch.tensor([[-1.5, -2.0], [-0.5, 0.0]]),
        "ref_logprobs_BR": torch.tensor([[-1.2, -1.0], [-0.5, 0.0]]),
        "values_BR": torch.zeros(2, 2),
        "scores_B": torch.zeros(2),
        "rewards_BR": torch.zeros(2, 2),
        "advantages_BR": torch.tensor([[1.0, -2.0], [3.0, torch.nan]]),
        "returns_BR": torch.zeros(2, 2),
    }
    made = [Rollout(Prompt(), [1], [1] * n, "", torch.zeros(n), "stop") for n in (2, 1)]
    return Experience(rollouts=made, **{**tensors, **changes})


def config(**changes: Any) -> Config:
    return Config(prompts=Data(path="unused"), **changes)


def loss_of(logp_BR: Tensor, experience: Experience, settings: Config) -> tuple[float, dict[str, float]]:
    loss, figures = policy_loss(logp_BR, experience, settings, penalty=2.0, leash=0.5, denom=3.0)
    return float(loss), {k: float(v) for k, v in figures.items()}


NEW = torch.tensor([[-0.9, -2.3], [-0.5, 0.0]])


def test_each_policy_has_its_own_ratio() -> None:
    e = 2.718281828459045
    w = [e**0.5, 1.0, 1.0]  # π_old/μ, token by token
    rho = [e**0.1, e**-0.3, 1.0]  # π/π_old
    k3 = [r - 1 - x for r, x in zip(rho, (0.1, -0.3, 0.0), strict=True)]
    stale = known(weights_BR=torch.tensor([[e**0.5, 1.0], [1.0, torch.nan]]))

    loss, figures = loss_of(NEW, stale, config(behaviour="stale"))
    # ρ = e^-0.3 = 0.74 with A < 0 is clipped at 0.8.
    assert loss == pytest.approx(-(w[0] * rho[0] * 1 + 0.8 * -2 + 3) / 3, rel=1e-6)
    assert figures["policy/clip_fraction"] == pytest.approx(1 / 3)
    assert figures["kl/old_token"] == pytest.approx(
        sum(x * y for x, y in zip(w, k3, strict=True)) / 3, rel=1e-5
    )
    assert figures["policy/ratio_max"] == pytest.approx(rho[0])

    loss, _ = loss_of(NEW, stale, config(objective="kl", behaviour="stale"))
    surrogate = w[0] * rho[0] * 1 + rho[1] * -2 + 3
    assert loss == pytest.approx((2.0 * (w[0] * k3[0] + k3[1]) - surrogate) / 3, rel=1e-5)

    loss, figures = loss_of(NEW, stale, config(objective="is"))
    v = [e**0.6, e**-0.3, 1.0]  # π/μ
    assert loss == pytest.approx((v[0] * 0.9 * 1 + v[1] * 2.3 * -2 + 0.5 * 3) / 3, rel=1e-5)
    assert figures["weight/mean"] == pytest.approx(sum(v) / 3, rel=1e-6)
    assert figures["weight/max"] == pytest.approx(v[0])
    assert figures["weight/capped_share"] == 0
    assert figures["weight/square"] == pytest.approx(sum(x**2 for x in v) / 3, rel=1e-5)
    assert figures["kl/old_token"] == pytest.approx((w[0] * k3[0] + k3[1]) / 3, rel=1e-5)
    assert float(update_kl(NEW, stale)) == pytest.approx((w[0] * k3[0] + k3[1]) / 3, rel=1e-5)

    loss, figures = loss_of(NEW, stale, config(objective="is", weight_cap=1.5))
    assert loss == pytest.approx((1.5 * 0.9 * 1 + v[1] * 2.3 * -2 + 0.5 * 3) / 3, rel=1e-5)
    assert figures["weight/capped_share"] == pytest.approx(1 / 3)

    loss, _ = loss_of(NEW, known(), config(objective="a2c", epochs=1, minibatches=1))
    assert loss == pytest.approx((0.9 * 1 + 2.3 * -2 + 0.5 * 3) / 3, rel=1e-6)


def test_the_leash_in_the_loss_looks_at_samples_of_the_old_policy() -> None:
    e = 2.718281828459045
    settings = config(behaviour="stale", kl={"where": "loss", "estimator": "k2"})
    k2 = [0.5 * (-0.9 + 1.2) ** 2, 0.5 * (-2.3 + 1.0) ** 2]
    stale = known(weights_BR=torch.tensor([[e**0.5, 1.0], [1.0, torch.nan]]))
    _, figures = loss_of(NEW, stale, settings)
    assert figures["leash/loss"] == pytest.approx(0.5 * (e**0.5 * k2[0] + k2[1]) / 3, rel=1e-5)
    _, figures = loss_of(NEW, known(), config(kl={"where": "loss", "estimator": "k2"}))
    assert figures["leash/loss"] == pytest.approx(0.5 * (k2[0] + k2[1]) / 3, rel=1e-5)


def test_weights_of_one_change_nothing() -> None:
    for objective in ("clip", "kl"):
        settings = config(objective=objective)
        assert loss_of(NEW, known(), settings) == loss_of(NEW, known(weights_BR=torch.ones(2, 2)), settings)


def test_rows_of_an_experience() -> None:
    part = known(weights_BR=torch.tensor([[1.0, 2.0], [3.0, 4.0]])).select([1])
    assert part.weights_BR is not None
    assert (part.weights_BR.tolist(), part.advantages_BR.tolist()) == ([[3.0]], [[3.0]])
    assert (part.mask_BR.tolist(), part.scores_B.shape) == ([[True]], (1,))
    assert known().select([0]).weights_BR is None
