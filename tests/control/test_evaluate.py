"""Evaluation: repeatable, fair to long episodes, blind to exploration; and the picture."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ppolite.control import evaluate as module
from ppolite.control.config import Control, Net, parse_control
from ppolite.control.envs import actions_of, make_env
from ppolite.control.evaluate import evaluate, film
from ppolite.control.policy import Policy


def made(env: str, *, episodes: int = 7, **more: Any) -> tuple[Policy, Control]:
    config = parse_control({"env": env, "evaluation": {"episodes": episodes, "gif_seconds": 1.0}, **more})
    one = make_env(config)
    size = int(np.prod(one.observation_space.shape or ()))
    return Policy(size, actions_of(one.action_space, env), Net(hidden=()), normalise_obs=True), config


def perfect(policy: Policy) -> None:
    """The policy of tiny/Match that names the state it is shown."""
    policy.agent.named["policy.weight"].copy_(torch.eye(3))


def test_the_perfect_policy_gets_every_point() -> None:
    policy, config = made("tiny/Match-v0")
    perfect(policy)
    result = evaluate(policy, config)
    assert result == {
        "return_mean": 8.0, "return_std": 0.0, "return_min": 8.0, "return_max": 8.0, "length_mean": 8.0,
        "episodes": 7,
    }  # fmt: skip


@pytest.mark.parametrize("episodes", [1, 7, 10, 23])
def test_the_number_of_episodes_is_kept(episodes: int) -> None:
    assert evaluate(*made("tiny/Match-v0", episodes=episodes))["episodes"] == episodes


def test_evaluation_is_repeatable_and_seeded() -> None:
    policy, config = made("tiny/Match-v0")
    first = evaluate(policy, config)
    assert first == evaluate(policy, config)
    other = parse_control({**config.model_dump(), "seed": 1})
    assert first != evaluate(policy, other)
    assert policy.norm is not None
    assert policy.norm.seen.count == 0  # nothing was counted


def test_long_episodes_count_as_much_as_short_ones() -> None:
    """Half of the episodes take 1 step, half 100. The first 40 to finish would be short ones, nearly all."""
    policy, config = made("tiny/Match-v0", episodes=40, envs={"options": {"length": 1, "also_length": 100}})
    assert 30 < evaluate(policy, config)["length_mean"] < 71  # 50.5 ± 2.6 standard errors


def test_an_episode_without_end_is_counted_where_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, config = made("tiny/Match-v0", envs={"options": {"length": 10**9}})
    monkeypatch.setattr(module, "MOST_STEPS", 20)
    assert evaluate(policy, config)["length_mean"] == 20


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_after_a_cut_comes_another_episode(vectorization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps give 1 + … + 10; what went on from there would give more."""
    policy, config = made("tiny/Endless-v0", episodes=23, envs={"vectorization": vectorization})
    monkeypatch.setattr(module, "MOST_STEPS", 10)
    result = evaluate(policy, config)
    assert (result["return_min"], result["return_max"], result["episodes"]) == (55.0, 55.0, 23)


def test_film_shows_one_episode(tmp_path: Path) -> None:
    policy, config = made("tiny/Match-v0")
    assert film(policy, config, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (300, 200)
        assert gif.n_frames > 1  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*render_mode:UserWarning")
def test_without_a_picture_there_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy, config = made("tiny/Aim-v0")
    with caplog.at_level(logging.WARNING):
        assert not film(policy, config, tmp_path / "a.gif")
    assert "tiny/Aim-v0: no GIF" in caplog.text
    assert not (tmp_path / "a.gif").exists()


@pytest.mark.parametrize("picture", ["none", "text", "list", "fatal"])
def test_whatever_drawing_comes_to_the_run_goes_on(
    picture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, config = made("tiny/Endless-v0", envs={"options": {"picture": picture}})
    with caplog.at_level(logging.WARNING):
        assert not film(policy, config, tmp_path / "a.gif")
    assert "tiny/Endless-v0: no GIF, for it cannot be drawn here (" in caplog.text
