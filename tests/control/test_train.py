"""Whole runs on tiny tasks: they learn, they repeat, they say when they broke."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ppolite.control.config import ALGORITHMS, Control, parse_control
from ppolite.control.evaluate import evaluate
from ppolite.control.train import train
from ppolite.obs.sinks import read_metrics
from ppolite.types import UserError

TASKS: dict[str, dict[str, Any]] = {
    "tiny/Match-v0": {"steps": 4000, "rollout": 16, "envs": {"count": 4}, "gamma": 0.5},
    "tiny/Aim-v0": {"steps": 16000, "rollout": 16, "envs": {"count": 8, "options": {"shape": [1]}}, "gamma": 0.1,
                    "net": {"hidden": [16], "log_std": -1.0}},
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "a2c": {"rollout": 4},
    "is-pg": {"epochs": 4},
    "ppo-kl": {"epochs": 4, "minibatches": 2},
    "ppo-clip": {"epochs": 4, "minibatches": 2},
}


def config_of(env: str = "tiny/Match-v0", algorithm: str = "ppo-clip", **more: Any) -> Control:
    base = {"env": env, "algorithm": algorithm, "net": {"hidden": [16]}, "evaluation": {"episodes": 20}}
    base |= {"optim": {"lr": 0.01}, "log_every": 500}
    return parse_control({**base, **TASKS[env], **OWN[algorithm], **more})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("env", TASKS)
def test_it_learns(env: str, algorithm: str, tmp_path: Path) -> None:
    """Chance is 2.7 of 8 on Match, and −2.7 with the mean of Aim's box, −5.3 with a uniform choice."""
    config = config_of(env, algorithm)
    result = evaluate(train(config, tmp_path), config)["return_mean"]
    assert result > (7.5 if env == "tiny/Match-v0" else -0.5)
    rows = read_metrics(tmp_path)
    assert rows[-1]["step"] == config.whole_steps
    assert rows[-1]["return/mean"] > rows[0]["return/mean"]


def measured(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k[:4] != "time"} for row in rows]


@pytest.mark.parametrize("env", TASKS)
def test_the_seed_decides_everything(env: str, tmp_path: Path) -> None:
    small = {"steps": 256, "log_every": 64}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(name))  # the global stream takes no part
        train(config_of(env, seed=seed, **small), tmp_path / name)
    assert measured(tmp_path / "a") == measured(tmp_path / "b")
    assert measured(tmp_path / "a") != measured(tmp_path / "c")


def test_async_environments_give_the_same_numbers(tmp_path: Path) -> None:
    for kind in ("sync", "async"):
        envs = {"count": 2, "vectorization": kind}
        train(config_of("tiny/Match-v0", steps=64, envs=envs), tmp_path / kind)
    assert measured(tmp_path / "sync") == measured(tmp_path / "async")


def test_lines_of_metrics(tmp_path: Path) -> None:
    config = config_of(steps=512, log_every=128, evaluation={"episodes": 2, "every": 200})
    threads = torch.get_num_threads()
    train(config, tmp_path)
    assert torch.get_num_threads() == threads
    rows = read_metrics(tmp_path)
    assert [r["step"] for r in rows if "policy/loss" in r] == [128, 256, 384, 512]
    assert [r["step"] for r in rows if "eval/return_mean" in r] == [256, 448]
    assert sum(r.get("episodes", 0) for r in rows) == 512 / 8
    assert rows[0]["return/min"] <= rows[0]["return/mean"] <= rows[0]["return/max"]
    wanted = {"policy/clip_fraction", "policy/grad_norm", "policy/entropy", "policy/clip", "value/loss", "lr",
              "value/explained_variance", "kl/old_step", "weights/ess", "length/mean", "time/steps_per_s"}  # fmt: skip
    assert set(rows[0]) >= wanted


@pytest.mark.filterwarnings("ignore:.*The reward is a NaN value:UserWarning")
@pytest.mark.parametrize(
    "algorithm", [{"algorithm": "ppo-clip"}, {"algorithm": "ppo-kl", "kl_target": 0.01}], ids=str
)
def test_a_broken_gradient_is_said(algorithm: dict[str, Any], tmp_path: Path) -> None:
    wild = {"env": "tiny/Wild-v0", "envs": {"options": {"reward": float("nan")}}, "rollout": 8}
    config = parse_control(wild | algorithm)
    with pytest.raises(UserError, match=r"the gradient became nan; lower optim\.lr"):
        train(config, tmp_path)
