"""Cells: trained once, found again, refused when other code made them; and what is read from their rows."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from experiments import training
from ppolite.control.config import Control, parse_control


def rows(*told: tuple[int, int, float | None]) -> list[dict[str, Any]]:
    return [
        {"step": step, "episodes": n} | ({} if mean is None else {"return/mean": mean})
        for step, n, mean in told
    ]


def test_a_curve_weighs_rows_by_their_episodes_and_bridges_gaps() -> None:
    seen = rows((5, 1, 10.0), (10, 3, 20.0), (15, 0, None), (20, 0, None), (30, 2, 40.0))
    assert training.curve(seen, every=10) == ([10, 20, 30], [17.5, 17.5, 40.0])


def test_a_curve_has_no_value_before_the_first_episode() -> None:
    assert training.curve(rows((10, 0, None), (20, 1, 3.0)), every=10) == ([10, 20], [None, 3.0])


def test_curves_begin_where_all_runs_have_a_value() -> None:
    """Values 2 and 4: mean 3, deviation √2, standard error 1."""
    late, early = rows((10, 0, None), (20, 1, 2.0)), rows((10, 1, 9.0), (20, 1, 4.0))
    found = training.curves([late, early], every=10)
    assert found == {"steps": [20], "mean": [3.0], "error": [1.0]}


def test_the_oldest_row_counts_in_part_among_the_last_episodes() -> None:
    seen = rows((1, 5, 100.0), (2, 3, 10.0), (3, 0, None), (4, 2, 20.0))
    assert training.last_episodes(seen, 4) == (2 * 20 + 2 * 10) / 4
    assert training.last_episodes(seen, 100) == (5 * 100 + 3 * 10 + 2 * 20) / 10


def test_no_episode_is_no_score() -> None:
    with pytest.raises(ValueError, match="no episode ended"):
        training.last_episodes(rows((1, 0, None)), 4)


def test_one_run_has_no_error() -> None:
    assert training.mean_and_error([7.0]) == (7.0, 0.0)


def test_comments_and_docstrings_are_no_part_of_a_program() -> None:
    plain = "def f(x):\n    y = x\n    return y\n"
    told = '"""A story."""\n\ndef f(x):\n    """f."""\n    y = x  # so\n    """y."""\n    return y\n'
    assert training._program(plain) == training._program(told)
    assert training._program(plain) != training._program(plain.replace("y = x", "y = -x"))


def options(folder: Path, **more: Any) -> Namespace:
    return Namespace(**({"cells": folder, "jobs": 1, "older": False, "dirty": True} | more))


@pytest.fixture
def wanted() -> dict[str, Control]:
    tree = {
        "env": "CartPole-v1",
        "steps": 64,
        "rollout": 32,
        "envs": {"count": 1},
        "epochs": 1,
        "log_every": 1,
    }
    return {"one/0": parse_control({**tree, "minibatches": 1})}


def test_a_cell_is_trained_once(tmp_path: Path, wanted: dict[str, Control]) -> None:
    made = training.runs("some", wanted, options(tmp_path))["one/0"]
    assert [row["step"] for row in made["rows"]] == [32, 64]
    assert parse_control(made["config"]) == wanted["one/0"]
    path = tmp_path / "one" / "0.json"
    path.write_text(json.dumps(made | {"seconds": -1}))
    assert training.runs("some", wanted, options(tmp_path))["one/0"]["seconds"] == -1
    other = {"one/0": wanted["one/0"].model_copy(update={"steps": 32})}
    with pytest.raises(SystemExit, match=r"one/0\.json: was made with other settings; delete it"):
        training.runs("some", other, options(tmp_path))  # a short trial, in the folder of long ones
    assert training.runs("some", wanted, options(tmp_path))["one/0"]["seconds"] == -1


def test_cells_of_other_code_are_refused_or_counted(tmp_path: Path, wanted: dict[str, Control]) -> None:
    made = training.runs("some", wanted, options(tmp_path))["one/0"]
    (tmp_path / "one" / "0.json").write_text(json.dumps(made | {"code": "other"}))
    with pytest.raises(SystemExit, match="1 of 1 finished runs were made by other code"):
        training.runs("some", wanted, options(tmp_path))
    kept = training.runs("some", wanted, options(tmp_path, older=True))
    assert training.origin(kept)["by_other_code"] == 1


def test_a_run_that_breaks_off_counts_as_far_as_it_went(wanted: dict[str, Control]) -> None:
    tree = wanted["one/0"].model_dump(mode="json")
    broken = training.learn(parse_control(tree | {"value_coef": 1e38, "steps": 320}))
    assert "gradient" in broken["stopped"]
    assert len(broken["rows"]) < 10
