"""The paper's comparison: its settings, its scale, and what is said about it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from experiments.not_too_far import PAPER, TASKS, complete, config_of, key_of, normalised, summary, wanted


def test_settings_are_the_papers() -> None:
    """2,048 steps a round, 10 epochs of minibatches of 64, Adam 3e-4; nothing differs but the loss."""
    trees = {name: config_of("Hopper-v5", name, 1, 200_000).model_dump() for name in PAPER if name != "A2C"}
    assert trees["clip"]["rollout"] / trees["clip"]["minibatches"] == 64
    own = ("algorithm", "clip", "beta", "kl_target")
    assert {name: tuple(tree.pop(key) for key in own) for name, tree in trees.items()} == {
        "none": ("is-pg", None, None, None),
        "clip": ("ppo-clip", 0.2, None, None),
        "adaptive KL": ("ppo-kl", None, 1.0, 0.01),
        "fixed KL": ("ppo-kl", None, 1.0, None),
    }
    assert len({str(tree) for tree in trees.values()}) == 1


def test_a_whole_seed_comes_before_the_next() -> None:
    seeds = [config.seed for config in wanted(3, 1_000).values()]
    assert seeds == [0] * 35 + [1] * 35 + [2] * 35


def test_random_is_0_and_the_best_run_1() -> None:
    scores = normalised({"task": {"a": [10.0, 30.0], "b": [-10.0, 20.0]}}, {"task": 10.0})
    assert scores == {"task": {"a": [0.0, 1.0], "b": [-1.0, 0.5]}}


def test_no_scale_without_a_run_that_beats_chance() -> None:
    with pytest.raises(ValueError, match="no run is better than random"):
        normalised({"task": {"a": [1.0]}}, {"task": 2.0})


def test_the_table_is_a_mean_over_runs() -> None:
    """Seven tasks × one seed, scores 0 … 6: mean 3, variance 28/6, standard error √(28/6/7)."""
    scores = {task: {name: [float(i)] for name in PAPER} for i, task in enumerate(TASKS)}
    row = summary(scores)["clip"]
    assert (row["score"], row["runs"], row["paper"]) == (3.0, 7, 0.82)
    assert row["error"] == pytest.approx((28 / 6 / 7) ** 0.5, abs=1e-3)
    assert row["without_half_cheetah"] == 3.5


def test_looking_early_needs_a_whole_seed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="0 of the 35"):
        complete(Namespace(cells=tmp_path, seeds=3, steps=1_000))


def test_runs_of_another_length_have_files_of_their_own() -> None:
    assert key_of(1_000, "T", "fixed KL", 2) == "1000/T/fixed-kl-2" != key_of(2_000, "T", "fixed KL", 2)
