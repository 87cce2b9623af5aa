"""Figures on control: what is kept, what is refused, what is said. The other library is not needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.control_returns import MADE, joined, kept_run, lines, own_run

from benchmarks import control, control_returns
from ppolite.config import save_recipe
from ppolite.control.config import Control, load_control, parse_control
from ppolite.types import UserError


def config(**more: Any) -> Control:
    small = {"episodes": 2, "gif_seconds": 0}
    return parse_control({"env": "CartPole-v1", "steps": 256, "rollout": 32, "evaluation": small} | more)


def test_a_finished_run_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    made = own_run(config(), folder, sha="abc")
    assert made["commit"] == "abc"
    assert made["steps"] == 256
    assert made["return_mean"] == json.loads((folder / "eval.json").read_text())["return_mean"]
    (folder / MADE).write_text(json.dumps(made | {"return_mean": 1.5}))
    looked_at_more = config(evaluation={"episodes": 2, "gif_seconds": 0, "every": 64})
    for same in (config(), looked_at_more):
        assert kept_run(same, folder) == made | {"return_mean": 1.5}
    with pytest.raises(UserError, match="holds a run of other settings"):
        kept_run(config(gamma=0.5), folder)


def test_other_seeds_of_the_same_settings_stay(capsys: pytest.CaptureFixture[str]) -> None:
    def of(rollout: int, who: str, **returns: float) -> dict[str, Any]:
        seeds = {name[1:]: {"return_mean": r, "settings": {"n": rollout}} for name, r in returns.items()}
        return {"config": {"rollout": rollout, "evaluation": len(seeds)}, who: {"mean": 0.0, "seeds": seeds}}

    kept = of(8, "ours", s0=1.0, s1=2.0, s10=4.0) | of(8, "sb3", s0=7.0)
    whole = joined(kept, of(8, "ours", s1=3.0, s2=4.0))
    assert list(whole["ours"]["seeds"]) == ["0", "1", "2", "10"]
    assert (whole["ours"]["mean"], whole["sb3"]["mean"]) == (3.0, 7.0)
    assert list(joined(kept, of(16, "ours", s1=3.0))["ours"]["seeds"]) == ["1"]
    assert "ours: seeds 0, 10 were of other settings, and go" in capsys.readouterr().err
    assert list(joined(kept, of(8, "ours", s1=3.0) | of(16, "sb3", s1=8.0))["sb3"]["seeds"]) == ["1"]
    assert list(joined({}, of(8, "ours", s1=3.0))["ours"]["seeds"]) == ["1"]


def test_without_the_other_library_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"^stable-baselines3 has no environment here .* brings it$"):
        control.require_peer()


def test_means_are_told_with_their_seeds() -> None:
    found = {
        "config": {},
        "ours": {"mean": 15.0, "seeds": {"0": {"return_mean": 10.04}, "2": {"return_mean": 20}}},
    }
    assert list(lines("Hop a2c", found)) == ["Hop a2c, ours: mean 15.0 of 10.0 (seed 0), 20.0 (seed 2)"]


def test_what_is_known_already_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second task is written beside the first, from kept runs alone: nothing is trained, no commit is asked for."""
    monkeypatch.setattr(control_returns, "RUNS", tmp_path)
    monkeypatch.setattr(control_returns, "RESULT", tmp_path / "docs" / "result.json")
    for name in control.ONE_THREAD:
        monkeypatch.setenv(name, "1")
    for algorithm in ("a2c", "ppo-kl"):
        for seed, score in (0, 400.0), (1, 500.0):
            kept = load_control("CartPole-v1", algorithm=algorithm, overrides=[f"seed={seed}"])
            folder = tmp_path / f"CartPole-v1-{algorithm}" / f"ours-{seed}"
            folder.mkdir(parents=True)
            save_recipe(kept, folder / "recipe.yaml")
            (folder / MADE).write_text(json.dumps({"return_mean": score, "commit": "abc"}))
        monkeypatch.setattr("sys.argv", ["x", "CartPole-v1", "--algorithm", algorithm, "--seeds", "0", "1"])
        control_returns.main()
        assert "mean 450.0 of 400.0 (seed 0), 500.0 (seed 1)" in capsys.readouterr().out
    written = json.loads((tmp_path / "docs" / "result.json").read_text())
    assert list(written) == ["CartPole-v1 a2c", "CartPole-v1 ppo-kl"]
    assert written["CartPole-v1 a2c"]["ours"]["mean"] == 450
    assert written["CartPole-v1 a2c"]["config"]["rollout"] == 5


def test_the_other_library_alone_leaves_our_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "docs" / "result.json"
    config = load_control("CartPole-v1").model_dump(mode="json", exclude={"seed"})
    seeds = {"0": {"return_mean": 400.0, "commit": "abc"}}
    result.parent.mkdir()
    result.write_text(
        json.dumps({"CartPole-v1 ppo-clip": {"config": config, "ours": {"mean": 400.0, "seeds": seeds}}})
    )
    folder = tmp_path / "CartPole-v1-ppo-clip" / "sb3-0"
    folder.mkdir(parents=True)
    (folder / MADE).write_text(json.dumps({"return_mean": 300.0, "settings": {}}))
    monkeypatch.setattr(control_returns, "RUNS", tmp_path)
    monkeypatch.setattr(control_returns, "RESULT", result)
    monkeypatch.setattr(control_returns, "require_peer", lambda: None)
    for name in control.ONE_THREAD:
        monkeypatch.setenv(name, "1")

    monkeypatch.setattr("sys.argv", ["x", "CartPole-v1", "--seeds", "--peer"])
    control_returns.main()
    written = json.loads(result.read_text())["CartPole-v1 ppo-clip"]
    assert (written["ours"]["seeds"], written["sb3"]["mean"]) == (seeds, 300.0)

    monkeypatch.setattr("sys.argv", ["x", "CartPole-v1", "--seeds"])
    with pytest.raises(SystemExit):
        control_returns.main()
    assert "nothing is left to run" in capsys.readouterr().err
