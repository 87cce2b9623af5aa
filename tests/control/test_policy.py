"""What is kept: saved and loaded it acts the same, and a file that is not ours is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box

from ppolite.control.config import Net
from ppolite.control.envs import actions_of
from ppolite.control.policy import Actions, Policy
from ppolite.types import UserError

LOW, HIGH = np.array([[-1.0, -np.inf]], np.float32), np.array([[1.0, 2.0]], np.float32)
KINDS = {"discrete": Actions("discrete", 4, start=3), "box": Actions("box", 2, low=LOW, high=HIGH)}


def policy_of(kind: str, **net: Any) -> Policy:
    policy = Policy(3, KINDS[kind], Net(hidden=(8,), **net), normalise_obs=True, seed=5)
    policy.see(np.random.default_rng(0).normal([1, 2, 3], [4, 5, 6], (100, 3)), update=True)
    return policy


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_acts_as_saved(kind: str, shared: bool, tmp_path: Path) -> None:
    policy = policy_of(kind, shared=shared, activation="relu")
    policy.save(tmp_path / "policy", {"env": "X-v0"})
    again = Policy.load(tmp_path / "policy")
    obs = np.random.default_rng(1).normal(0, 10, (50, 3))
    np.testing.assert_array_equal(policy.act(obs), again.act(obs))
    assert {p.suffix for p in (tmp_path / "policy").iterdir()} == {".safetensors", ".json"}
    assert json.loads((tmp_path / "policy" / "policy.json").read_text())["about"] == {"env": "X-v0"}
    if kind == "discrete":
        assert set(again.act(obs).tolist()) <= {3, 4, 5, 6}
    else:
        assert again.act(obs).shape == (50, 1, 2)
        assert (again.act(obs) <= HIGH).all()


def test_a_transposed_box_is_saved(tmp_path: Path) -> None:
    low = np.zeros((2, 3), np.float32).T
    policy = Policy(3, actions_of(Box(low - 1, low + 1), "X"), Net(hidden=()), normalise_obs=False)
    policy.save(tmp_path / "policy")
    assert Policy.load(tmp_path / "policy").act(np.zeros((1, 3), np.float32)).shape == (1, 3, 2)


def test_statistics_are_saved_and_frozen(tmp_path: Path) -> None:
    policy = policy_of("discrete")
    policy.save(tmp_path / "policy")
    again = Policy.load(tmp_path / "policy")
    assert again.norm is not None
    assert policy.norm is not None
    before = again.norm.seen.mean.copy()
    np.testing.assert_array_equal(before, policy.norm.seen.mean)
    again.act(np.full((9, 3), 1e3))
    np.testing.assert_array_equal(again.norm.seen.mean, before)


def test_saving_replaces_the_folder_whole(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "old").write_text("x")
    policy_of("box").save(tmp_path / "policy")
    assert not (tmp_path / "policy" / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


@pytest.mark.parametrize("what", ["nothing", "not json", "no weights", "broken weights", "other net"])
def test_what_is_no_policy_is_refused(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    if what != "nothing":
        policy_of("discrete").save(folder)
    if what == "not json":
        (folder / "policy.json").write_text("{")
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    if what == "broken weights":
        (folder / "model.safetensors").write_bytes(b"cos\nsystem\n.")
    if what == "other net":
        sheet = json.loads((folder / "policy.json").read_text())
        sheet["net"]["hidden"] = [9]
        (folder / "policy.json").write_text(json.dumps(sheet))
    with pytest.raises(UserError, match="policy") as caught:
        Policy.load(folder)
    assert "\n" not in str(caught.value)
