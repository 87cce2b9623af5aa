"""Recipes of control: defaults of the algorithms, which layer stands over which, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from ppolite.config import RECIPES, save_recipe
from ppolite.control.config import (
    ALGORITHMS,
    Control,
    control_recipe,
    is_control_run,
    load_control,
    load_control_run,
    merged,
    parse_control,
    shipped_control,
)
from ppolite.types import UserError

SIX = {"acrobot", "cartpole", "halfcheetah", "hopper", "lunarlander", "pendulum"}


def test_importable_without_torch_and_gymnasium() -> None:
    code = "import sys, ppolite.control.config; print({'torch', 'gymnasium', 'numpy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_every_setting_is_explained() -> None:
    for section in (Control, *(f.annotation for f in Control.model_fields.values())):
        if isinstance(section, type) and issubclass(section, BaseModel):
            assert section.__doc__
            for name, info in section.model_fields.items():
                assert info.description or name in {"envs", "net", "optim", "evaluation"}, name


def test_algorithms_bring_their_defaults() -> None:
    a2c, clip, kl = (Control(env="X-v0", algorithm=a) for a in ("a2c", "ppo-clip", "ppo-kl"))
    assert (a2c.optim.kind, a2c.optim.lr, a2c.rollout, a2c.lam, a2c.epochs) == ("rmsprop", 7e-4, 5, 1.0, 1)
    assert not a2c.normalise_advantages
    assert (clip.clip, clip.beta, clip.kl_target) == (0.2, None, None)
    assert (kl.clip, kl.beta, kl.kl_target) == (None, 1.0, 0.01)
    assert Control(env="X-v0").algorithm == "ppo-clip"


def test_later_layers_stand_over_earlier(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "env: X-v0\ngamma: 0.9\nrollout: 7\nalgorithms:\n  a2c: {rollout: 9, optim: {lr: 0.5}}\n  ppo-clip: {}\n"
    )
    plain, a2c = load_control(str(path)), load_control(str(path), algorithm="a2c")
    assert (plain.algorithm, plain.gamma, plain.rollout) == ("ppo-clip", 0.9, 7)
    assert (a2c.gamma, a2c.rollout, a2c.optim.lr, a2c.optim.kind) == (0.9, 9, 0.5, "rmsprop")
    told = load_control(str(path), overrides=["algorithm=a2c", "rollout=11", "optim.eps=1"])
    assert (told.algorithm, told.rollout, told.optim.lr, told.optim.eps) == ("a2c", 11, 0.5, 1.0)
    assert load_control(str(path), algorithm="ppo-kl", overrides=["kl_target=null"]).kl_target is None


def test_merged_leaves_its_arguments_alone() -> None:
    low, high = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}}
    assert merged(low, high) == {"a": {"b": 9, "c": 2}, "d": 3}
    assert (low, high) == ({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}})


def test_an_environment_finds_its_recipe() -> None:
    assert (
        control_recipe("CartPole-v1") == control_recipe("cartpole") == RECIPES / "control" / "cartpole.yaml"
    )
    assert control_recipe("MountainCar-v0") is None
    assert load_control("CartPole-v1").lam == 0.8
    assert load_control("MountainCar-v0") == Control(env="MountainCar-v0")


def test_rounds_are_whole() -> None:
    config = parse_control(
        {"env": "X-v0", "steps": 100, "rollout": 8, "envs": {"count": 4}, "minibatches": 2}
    )
    assert (config.round_size, config.whole_steps) == (32, 128)


def test_the_shipped_ones() -> None:
    assert set(shipped_control()) == SIX


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", sorted(SIX))
def test_shipped_recipe_loads_for_every_algorithm(name: str, algorithm: str, tmp_path: Path) -> None:
    config = load_control(name, algorithm=algorithm)
    assert config.algorithm == algorithm
    head = [line for line in shipped_control()[name].read_text().splitlines() if line.startswith("#")]
    assert any(f"ppolite control recipes/control/{name}.yaml" in line for line in head)
    save_recipe(config, tmp_path / "recipe.yaml")
    assert is_control_run(tmp_path)
    assert load_control_run(tmp_path) == config


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "r: `env` is missing; add it"),
        ({"env": "X", "gama": 1}, "r: unknown key `gama`; did you mean `gamma`?"),
        ({"env": "X", "optim": {"rl": 1}}, "r: unknown key `optim.rl`; did you mean `optim.lr`?"),
        ({"env": "X", "algorithm": "sac"}, "`algorithm` is 'sac'; input should be 'a2c'"),
        ({"env": "X", "steps": 0}, "`steps` is 0"),
        ({"env": "X", "algorithm": "a2c", "clip": 0.2}, "algorithm is a2c, which has no `clip`; ppo-clip has"),
        ({"env": "X", "kl_target": 0.1}, "algorithm is ppo-clip, which has no `kl_target`; ppo-kl has"),
        ({"env": "X", "max_weight": 2}, "which has no `max_weight`; is-pg has"),
        ({"env": "X", "algorithm": "is-pg", "clip_schedule": "linear"}, "which has no `clip_schedule`"),
        ({"env": "X", "algorithm": "a2c", "epochs": 2}, "set epochs and minibatches to 1"),
        ({"env": "X", "clip": None}, "algorithm is ppo-clip, which needs `clip`"),
        ({"env": "X", "algorithm": "ppo-kl", "beta": None}, "which needs `beta`"),
        ({"env": "X", "algorithm": "ppo-kl", "beta": 0}, "which needs `beta`, above 0"),
        ({"env": "X", "rollout": 1, "minibatches": 9}, "minibatches (9) exceed the 8 steps of a round"),
        ({"env": "X", "rollout": 3, "minibatches": 13}, "the 24 steps of a round (rollout × envs.count) make 13"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        parse_control(tree, where="r")
    assert "\n" not in str(caught.value)


def test_unknown_algorithms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown algorithm 'ppo'; did you mean ppo-clip"):
        load_control("cartpole", algorithm="ppo")
    (tmp_path / "r.yaml").write_text("env: X-v0\nalgorithms: {a3c: {}}\n")
    with pytest.raises(UserError, match="unknown algorithm 'a3c'; did you mean a2c"):
        load_control(str(tmp_path / "r.yaml"))
    with pytest.raises(UserError, match=r"no such recipe; give a YAML file or one of acrobot, cartpole"):
        load_control("nowhere.yaml")


def test_a_run_of_another_kind_is_told_apart(tmp_path: Path) -> None:
    assert not is_control_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    assert not is_control_run(tmp_path)
    with pytest.raises(UserError, match="no control run"):
        load_control_run(tmp_path)
