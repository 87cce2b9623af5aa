"""Gymnasium's environments as ours: which are taken, which are refused, and how."""

from __future__ import annotations

import re
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from ppolite.control.config import Control, parse_control
from ppolite.control.envs import actions_of, make_env, make_envs, obs_size
from ppolite.types import UserError


def config_of(env: str, **envs: Any) -> Control:
    return parse_control({"env": env, "envs": envs})


def test_they_reset_in_the_step_that_ends_an_episode() -> None:
    with closing(make_envs(config_of("tiny/Clock-v0"), 2)) as envs:
        assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        envs.reset(seed=0)
        for _ in range(2):
            envs.step(np.zeros(2, np.int64))
        obs, _, _, truncated, info = envs.step(np.zeros(2, np.int64))
        assert obs.tolist() == [[0.0], [0.0]]
        assert truncated.all()
        assert [o.tolist() for o in info["final_obs"]] == [[3.0], [3.0]]


def test_observations_of_any_kind_become_a_row() -> None:
    with closing(make_envs(config_of("tiny/Wild-v0"), 3)) as envs:
        obs, _ = envs.reset(seed=0)
        assert obs_size(envs) == 2 + 4  # one-hot, and 2 × 2
        assert obs.shape == (3, 6)


def test_options_reach_the_environment() -> None:
    env = make_env(config_of("tiny/Match-v0", options={"length": 3}))
    assert env.unwrapped.length == 3  # type: ignore[attr-defined]


def test_actions() -> None:
    shift = actions_of(gym.spaces.Discrete(3, start=5), "X")
    assert shift.to_env(np.array([0, 2])).tolist() == [5, 7]
    box = actions_of(gym.spaces.Box(np.array([[-1.0, 0.0]]), np.array([[1.0, 9.0]]), dtype=np.float64), "X")
    assert (box.kind, box.size) == ("box", 2)
    assert box.to_env(np.array([[-5.0, -5.0], [0.5, 10.0]])).tolist() == [[[-1.0, 0.0]], [[0.5, 9.0]]]


@pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning")
@pytest.mark.parametrize(
    ("env", "envs", "message"),
    [
        ("CartPol-v1", {}, "CartPol-v1: no environment of that name; did you mean CartPole-v1?"),
        ("cartpole-v1", {}, "did you mean CartPole-v1?"),
        ("LunarLander-v2", {}, "LunarLander-v2: no environment of that name; did you mean LunarLander-v3?"),
        ("Zzz-v0", {}, "Zzz-v0: no environment of that name; "),
        ("runs/nope", {}, "runs/nope: no such run folder or recipe, nor an environment"),
        ("no_such_module:X-v0", {}, "no_such_module:X-v0: cannot be imported"),
        ("tiny/Match-v0", {"options": {"lenght": 3}}, "cannot be made with envs.options {'lenght': 3}"),
        ("tiny/Wild-v0", {"options": {"actions": "multi"}}, "its actions are MultiDiscrete([2 3])"),
    ],
)
def test_what_is_wrong_is_said(env: str, envs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        make_envs(config_of(env, **envs), 1)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise gym.error.DependencyNotInstalled("MuJoCo is not installed")

    monkeypatch.setattr(gym, "make", missing)
    with pytest.raises(UserError, match=re.escape("pip install '.[control]'")):
        make_env(config_of("Hopper-v5"))


@pytest.mark.parametrize("name", ["acrobot", "cartpole", "halfcheetah", "hopper", "lunarlander", "pendulum"])
def test_environments_of_the_shipped_recipes_are_there(name: str) -> None:
    from ppolite.control.config import load_control

    with closing(make_envs(load_control(name), 1)) as envs:
        envs.reset(seed=0)
        obs, *_ = envs.step(envs.action_space.sample())
        assert obs.shape == (1, obs_size(envs))
