"""Old episodes: what they say about their own policy, and what weights make of them."""

from __future__ import annotations

import math
from contextlib import closing

import pytest
import torch

from experiments import own_or_old_control as oo
from ppolite.control.config import Control, load_control
from ppolite.control.envs import actions_of, make_envs
from ppolite.control.policy import Policy


def test_weighted_returns_by_hand() -> None:
    """Weights 2 and ½ on the steps of the first episode, 3 on the one of the second; reward 1 a step."""
    mask_BT = torch.tensor([[True, True], [True, False]])
    log_BT = torch.tensor([[2.0, 0.5], [3.0, 1.0]]).log()
    assert oo.estimated_returns(log_BT, mask_BT).tolist() == pytest.approx([2.5, 3.0])


def test_samples_are_steps_or_episodes() -> None:
    """Weights 1 and 3 of two episodes are worth (1 + 3)² / (1 + 9) = 1.6 of 2; of their three steps 49/19 of 3."""
    mask_BT = torch.tensor([[True, False], [True, True]])
    log_BT = torch.tensor([[1.0, 1.0], [3.0, 3.0]]).log()
    assert oo.ess_share(log_BT, mask_BT, "trajectory") == pytest.approx(1.6 / 2)
    assert oo.ess_share(log_BT, mask_BT, "step") == pytest.approx(49 / 19 / 3)


@pytest.fixture(scope="module")
def world() -> tuple[Policy, Control, oo.Episodes]:
    config = load_control("cartpole", algorithm="is-pg")
    with closing(make_envs(config, 1)) as envs:
        policy = Policy(4, actions_of(envs.single_action_space, config.env), config.net, normalise_obs=False)
    return policy, config, oo.play(policy, config, 50, seed=0)


def test_only_first_episodes_count(world: tuple[Policy, Control, oo.Episodes]) -> None:
    """A policy that has learned nothing drops the pole after about 22 steps, and never before the eighth."""
    episodes = world[2]
    lengths_B = episodes.returns_B
    assert (episodes.mask_BT.long().diff(dim=1) <= 0).all()
    assert int(lengths_B.min()) >= 8
    assert 15 < float(lengths_B.double().mean()) < 30


def test_old_episodes_of_the_same_policy_are_worth_themselves(
    world: tuple[Policy, Control, oo.Episodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, _, episodes = world
    monkeypatch.setattr(oo, "BATCH", 10)
    monkeypatch.setattr(oo, "BATCHES", 5)
    returns_B = episodes.returns_B.double()
    found = oo.compare(policy, episodes, returns_B)
    assert found["kl_step"] == pytest.approx(0, abs=1e-7)
    assert found["own_error"] == pytest.approx(float(returns_B.std()) / math.sqrt(10))
    for name, _, _ in oo.KINDS:
        assert found["ess"][name] == pytest.approx(1)
        assert found["estimate"][name]["bias"] == pytest.approx(0, abs=1e-5)


def test_every_number_of_passes_is_there_once() -> None:
    keys = {key.split("/")[0] for key in oo.wanted(oo.argparse.Namespace(seeds=1, steps=1_000))}
    passes = {"is-pg-1", *(f"{f}-{k}" for f in ("is-pg", "is-pg-cut", "ppo-clip") for k in (4, 10, 40))}
    assert keys == {"a2c", *passes}
