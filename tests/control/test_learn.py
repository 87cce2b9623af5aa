"""Updates: each algorithm's gradient and rule against arithmetic, the schedules, the optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppolite.control.config import Control, Optim, parse_control
from ppolite.control.learn import Learner, Optimizer, clip_norm_
from ppolite.control.nets import Agent, Categorical
from ppolite.control.rounds import Batch

N = 64


def made(algorithm: str, **more: Any) -> tuple[Learner, Batch, Control]:
    """A learner, and a batch of its own policy in which action 0 is good and the rest is bad."""
    tree = {"env": "X-v0", "algorithm": algorithm, "rollout": N, "epochs": 1, "minibatches": 1}
    config = parse_control({**tree, "net": {"hidden": [8]}, "optim": {"lr": 0.01}, **more})
    agent = Agent(3, Categorical(3), config.net, seed=0)
    draw = torch.Generator().manual_seed(0)
    obs, actions = torch.randn(N, 3, generator=draw), torch.randint(3, (N,), generator=draw)
    with torch.no_grad():
        params, values = agent(obs)
    advantages = torch.where(actions == 0, 1.0, -0.5)
    mask = torch.ones(N, dtype=torch.bool)
    logprobs = agent.dist.logprob(params, actions)
    batch = Batch(obs, actions, logprobs, params, values, advantages, values + advantages, mask)
    return Learner(agent, config, seed=0), batch, config


def ours(learner: Learner, batch: Batch) -> Tensor:
    """The gradient of the policy's loss in the nets' outputs, [N, A]."""
    done = learner.agent.forward(batch.obs_MD)
    learner.policy_loss(batch, learner.agent.params(done))[0].backward()
    assert done.outputs_NA.grad is not None
    return done.outputs_NA.grad


def policy_gradient(learner: Learner, batch: Batch) -> Tensor:
    """The gradient of −mean A log π: −A (1[a] − π) / N."""
    chosen = torch.nn.functional.one_hot(batch.actions_M, 3)
    return -batch.advantages_M[:, None] * (chosen - learner.agent(batch.obs_MD)[0].exp()) / N


@pytest.mark.parametrize("algorithm", ["a2c", "is-pg", "ppo-kl", "ppo-clip"])
def test_all_four_start_with_the_policy_gradient(algorithm: str) -> None:
    """At π_θ = π_old every weight and ratio is 1, nothing is clipped and KL has no gradient."""
    learner, batch, _ = made(algorithm)
    torch.testing.assert_close(ours(learner, batch), policy_gradient(learner, batch), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("algorithm", ["a2c", "is-pg", "ppo-kl", "ppo-clip"])
def test_good_actions_become_likelier(algorithm: str) -> None:
    learner, batch, _ = made(algorithm, **({} if algorithm == "a2c" else {"epochs": 10}))
    for _ in range(10 if algorithm == "a2c" else 1):
        learner.learn(batch, left=1.0)
    with torch.no_grad():
        params, values = learner.agent(batch.obs_MD)
    assert params[:, 0].exp().mean() > batch.params_MP[:, 0].exp().mean() + 0.02
    before, after = ((v - batch.returns_M).square().mean() for v in (batch.values_M, values))
    assert after < before


def test_clipping_stops_what_no_clipping_does_not() -> None:
    moved = {}
    for algorithm in ("is-pg", "ppo-clip"):
        learner, batch, _ = made(algorithm, epochs=200, optim={"lr": 0.05})
        learner.learn(batch, left=1.0)
        moved[algorithm] = learner.kl(batch)
    assert moved["ppo-clip"] < 0.3 * moved["is-pg"]


def test_beta_follows_the_papers_rule() -> None:
    """d < target / 1.5 halves β, d > 1.5 target doubles it, with d the KL of the finished round."""
    learner, batch, _ = made("ppo-kl", beta=2.0, kl_target=1e9)
    learner.learn(batch, left=1.0)
    assert learner.beta == 1.0
    learner, batch, _ = made("ppo-kl", beta=2.0, kl_target=1e-12)
    learner.learn(batch, left=1.0)
    assert learner.beta == 4.0
    learner, batch, _ = made("ppo-kl", beta=2.0)
    d = learner_kl_after(batch)
    learner, batch, _ = made("ppo-kl", beta=2.0, kl_target=d)
    learner.learn(batch, left=1.0)
    assert learner.beta == 2.0
    learner, batch, _ = made("ppo-kl", beta=2.0, kl_target=None)
    learner.learn(batch, left=1.0)
    assert learner.beta == 2.0


def learner_kl_after(batch: Batch) -> float:
    learner, batch, _ = made("ppo-kl", beta=2.0)
    learner.learn(batch, left=1.0)
    return learner.kl(batch)


def test_beta_holds_the_policy_back() -> None:
    moved = []
    for beta in (0.0, 100.0):
        learner, batch, _ = made("ppo-kl", beta=beta, kl_target=None, epochs=20)
        learner.learn(batch, left=1.0)
        moved.append(learner.kl(batch))
    assert moved[1] < 0.1 * moved[0]


def test_weights_are_truncated() -> None:
    learner, batch, _ = made("is-pg", max_weight=0.25)
    torch.testing.assert_close(
        ours(learner, batch), 0.25 * policy_gradient(learner, batch), rtol=1e-4, atol=1e-7
    )


def test_schedules_fall_to_zero_with_the_run() -> None:
    learner, batch, _ = made("ppo-clip", clip_schedule="linear", clip=0.4)
    for left in (1.0, 0.25):
        learner.learn(batch, left=left)
        assert learner.lr == pytest.approx(0.01 * left)
        assert learner.clip == pytest.approx(0.4 * left)
        assert learner.settings() == {"lr": learner.lr, "policy/clip": learner.clip}
    learner, batch, _ = made("ppo-clip", clip_schedule="linear", clip=0.2, clip_high=0.4)
    learner.learn(batch, left=0.25)
    assert learner.settings() == pytest.approx(
        {"lr": learner.lr, "policy/clip": 0.05, "policy/clip_high": 0.1}
    )
    learner, batch, _ = made("ppo-clip", optim={"lr": 0.01, "schedule": "constant"})
    learner.learn(batch, left=0.25)
    assert (learner.lr, learner.clip) == (0.01, 0.2)


@pytest.mark.parametrize("kind", ["adam", "rmsprop"])
def test_the_optimizer_is_torchs(kind: Any) -> None:
    start, draw = torch.randn(9, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2)
    ours, theirs = start.clone(), nn.Parameter(start.clone())
    optimizer = Optimizer(ours, Optim(kind=kind, eps=1e-3))
    torchs = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[kind]([theirs], lr=0.1, eps=1e-3)
    for lr in (0.1, 0.05, 0.02):
        gradient = torch.randn(9, generator=draw)
        theirs.grad, torchs.param_groups[0]["lr"] = gradient.clone(), lr
        optimizer.step(gradient, lr)
        torchs.step()
        torch.testing.assert_close(ours, theirs.detach())


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_gradients_are_clipped_as_torch_does(max_norm: float) -> None:
    gradient, p = torch.arange(9.0), nn.Parameter(torch.zeros(9))
    p.grad = gradient.clone()
    assert clip_norm_(gradient, max_norm) == pytest.approx(float(nn.utils.clip_grad_norm_([p], max_norm)))
    torch.testing.assert_close(gradient, p.grad, rtol=1e-5, atol=1e-7)


def test_an_update_is_clipped_to_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, batch, _ = made("a2c", optim={"lr": 0.01, "max_grad_norm": 0.01})
    given: list[float] = []
    monkeypatch.setattr(learner.optimizer, "step", lambda g, lr: given.append(float(g.norm())))
    (update,) = learner.learn(batch, left=1.0)
    assert given == [pytest.approx(0.01)]
    assert update["policy/grad_norm"] > 0.01


def test_entropy_keeps_the_policy_open() -> None:
    open_, shut = (made("is-pg", entropy_coef=c, epochs=100)[:2] for c in (1.0, 0.0))
    entropies = []
    for learner, batch in (open_, shut):
        learner.learn(batch, left=1.0)
        entropies.append(learner.figures(batch)["policy/entropy"])
    assert entropies[0] > entropies[1] + 0.1


def test_figures_of_an_unmoved_policy() -> None:
    learner, batch, _ = made("ppo-clip")
    figures = learner.figures(batch)
    assert figures["kl/old_step"] == pytest.approx(0, abs=1e-7)
    assert figures["weights/ess"] == pytest.approx(1, abs=1e-5)
    assert figures["policy/entropy"] == pytest.approx(1.0986, abs=1e-3)  # log 3
