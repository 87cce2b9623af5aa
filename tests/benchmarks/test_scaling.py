"""The points of `scaling`: recipes that load, and shapes that are what they are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scaling
from ppolite import load_recipe

POINTS = list(dict.fromkeys(point for series in scaling.SERIES.values() for point in series.values()))


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_a_third_of_the_layers_is_trained(point: scaling.Point, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "model", lambda _: scaling.EMBEDDED)
    recipe = load_recipe("film", scaling.overrides(point))
    layers = scaling.SHAPES.get(point.model, scaling.SMALL)["num_hidden_layers"]
    assert recipe.trunk.split == layers - -(-layers // 3)
    assert recipe.ppo
    assert (recipe.ppo.rollouts, recipe.ppo.max_new_tokens) == point[:2]


@pytest.mark.real
def test_the_small_shape_is_that_of_the_embedded_model(real_model: Path) -> None:
    config = json.loads((real_model / "config.json").read_text())
    assert {key: config[key] for key in scaling.SMALL} == scaling.SMALL
