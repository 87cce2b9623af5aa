"""Several sources as one score: by hand, and the units in which they meet."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.rollout.sources.kit import said

from ppolite.config import PPO
from ppolite.models.roles import Norm
from ppolite.rollout.experience import source_means
from ppolite.rollout.sources.combine import Combined, combined, fixed_units, measured_units
from ppolite.types import Rollout, UserError


@dataclass
class Says:
    """A source made of a function of the text."""

    judge: Callable[[str], Any]

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [self.judge(r.text) for r in rollouts]


def ppo(*rewards: dict[str, Any], **more: Any) -> PPO:
    return PPO.model_validate({"prompts": {"path": "x.jsonl"}, "rewards": rewards, **more})


def fun(name: str, **more: Any) -> dict[str, Any]:
    return {"kind": "function", "function": f"m:{name}", **more}


def score(values: dict[str, float], config: PPO, model_norm: Norm = Norm()) -> float:  # noqa: B008
    return combined(values, config, fixed_units(config, model_norm))


def test_one_judge_is_itself() -> None:
    assert score({"a": 0.7}, ppo(fun("a"))) == 0.7
    assert score({"a": 0.7}, ppo(fun("a", shift=0.2, scale=0.5))) == pytest.approx(1.0)


def test_weighted_mean() -> None:
    # (3 · 2 + 1 · (−4)) / 4
    assert score({"a": 2.0, "b": -4.0}, ppo(fun("a", weight=3), fun("b", weight=1))) == pytest.approx(0.5)
    assert score({"a": 2.0, "b": -4.0}, ppo(fun("a", weight=30), fun("b", weight=10))) == pytest.approx(0.5)


def test_the_run_s_model_comes_in_its_own_units() -> None:
    config = ppo({"kind": "model"}, fun("a"))
    # ((5 − 1) / 2 + 1) / 2
    assert score({"model": 5.0, "a": 1.0}, config, Norm(1.0, 2.0, offset=9.0)) == pytest.approx(1.5)


def test_mean_less_k_deviations() -> None:
    # mean 2, deviation (ddof 0) √((1 + 1 + 4) / 3) = √2
    three = [fun(n) for n in "abc"]
    values = {"a": 1.0, "b": 1.0, "c": 4.0}
    assert score(values, ppo(*three)) == pytest.approx(2.0)
    assert score(values, ppo(*three, disagreement=0.5)) == pytest.approx(2 - 0.5 * 2**0.5)
    # weights 3 and 1: mean 1, deviation √((3 · 1 + 1 · 9) / 4) = √3
    two = ppo(fun("a", weight=3), fun("b"), disagreement=2)
    assert score({"a": 0.0, "b": 4.0}, two) == pytest.approx(1 - 2 * 3**0.5)


def test_judges_that_agree_lose_nothing() -> None:
    config = ppo(fun("a"), fun("b"), disagreement=5)
    assert score({"a": 0.3, "b": 0.3}, config) == pytest.approx(0.3)


def test_penalties_are_added_beside_the_mean() -> None:
    rules = {"kind": "length", "max": 9, "weight": 0.1}, {"kind": "format", "pattern": "x", "weight": 2}
    values = {"a": 1.0, "b": 3.0, "length": -4.0, "format": -1.0}
    assert score(values, ppo(fun("a"), fun("b"), *rules, disagreement=1)) == pytest.approx(2 - 1 - 0.4 - 2)
    assert score({"length": -4.0, "format": 0.0}, ppo(*rules)) == pytest.approx(-0.4)


def test_what_each_source_gave_stays_with_the_rollout() -> None:
    config = ppo(fun("a", shift=1, scale=2), {"kind": "length", "max": 5, "name": "brief"})
    made = Combined(config, {"a": Says(len), "brief": Says(lambda t: -1.0)}, Norm(), dict)
    rollouts = [said("abc"), said("abcde")]
    assert made.score(rollouts) == [0.0, 1.0]
    assert [r.rewards for r in rollouts] == [{"a": 3, "brief": -1.0}, {"a": 5, "brief": -1.0}]
    assert source_means(rollouts) == {"reward/a": 4.0, "reward/brief": -1.0}
    assert source_means([rollouts[0], said("new")]) == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "1"])
def test_a_value_that_is_no_number_names_its_source(bad: Any) -> None:
    made = Combined(ppo(fun("a"), fun("b")), {"a": Says(len), "b": Says(lambda t: bad)}, Norm(), dict)
    with pytest.raises(
        UserError, match=f"rewards: `b` gave {bad!r} for response 1 of 1, not a finite number"
    ):
        made.score([said("x")])


# ---- measured units --------------------------------------------------------------------------------------


class Samples:
    """Answers of the SFT model, and how often they were drawn."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.drawn = texts, 0

    def __call__(self) -> list[Rollout]:
        self.drawn += 1
        return [said(text) for text in self.texts]


SOURCES = {"a": Says(len), "b": Says(lambda t: 10.0 * len(t))}


def units(config: PPO, samples: Samples, path: Path, **origin: Any) -> dict[str, Norm]:
    return measured_units(config, SOURCES, samples, path, lambda: {"seed": 0, **origin})


@pytest.mark.parametrize(
    ("settings", "unit"),
    [
        # lengths 1, 1, 4: mean 2, deviation √2
        ({"shift": None, "scale": None}, (2, 2**0.5)),
        ({"shift": None, "scale": 3.0}, (2, 3)),
        ({"shift": 1.0, "scale": None}, (1, 2**0.5)),
    ],
)
def test_units_by_hand(tmp_path: Path, settings: dict[str, Any], unit: tuple[float, float]) -> None:
    config = ppo(fun("a", **settings), fun("b"))
    made = units(config, Samples("x", "y", "abcd"), tmp_path / "u.json")
    assert list(made) == ["a"]
    assert (made["a"].mean, made["a"].std) == pytest.approx(unit)
    assert fixed_units(config, Norm()) == {"b": Norm(0.0, 1.0)}
    kept = json.loads((tmp_path / "u.json").read_text())["units"]["a"]
    assert (kept["shift"], kept["scale"]) == pytest.approx(unit)


def test_nothing_is_drawn_where_nothing_is_to_be_measured(tmp_path: Path) -> None:
    samples = Samples("x", "y")
    assert units(ppo(fun("a", shift=3), {"kind": "model"}), samples, tmp_path / "u.json") == {}
    assert samples.drawn == 0
    assert not (tmp_path / "u.json").exists()


def test_units_are_measured_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_ = {"shift": None, "scale": None}
    samples, path = Samples("x", "abc"), tmp_path / "run" / "u.json"
    first = units(ppo(fun("a", **open_)), samples, path)
    assert units(ppo(fun("a", **open_)), samples, path) == first
    # What weighs or names a source does not change its units.
    assert units(ppo(fun("a", weight=2, **open_), fun("b")), samples, path) == first
    assert samples.drawn == 1
    with caplog.at_level(logging.WARNING, "ppolite"):
        assert units(ppo(fun("a", **open_)), samples, path, seed=1) == first
        assert units(ppo(fun("a", timeout=3, **open_)), samples, path) == first
    assert samples.drawn == 3
    assert caplog.text.count("measuring anew") == 2


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    config, path = ppo(fun("a", scale=None)), tmp_path / "u.json"
    for text in ("{", "[]", "{}", "null"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"u\.json.*; delete it"):
            units(config, Samples("x", "abc"), path)


def test_a_constant_judge_has_no_scale(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`a` gives 1 for all of 2 answers of the SFT model.*set its scale"):
        units(ppo(fun("a", scale=None)), Samples("x", "y"), tmp_path / "u.json")
    made = units(ppo(fun("a", shift=None)), Samples("x", "y"), tmp_path / "u.json")
    assert made == {"a": Norm(1.0, 1.0)}


def test_measured_scores_have_mean_0_and_deviation_1(tmp_path: Path) -> None:
    config = ppo(fun("a", shift=None, scale=None))
    samples = Samples("x", "abc", "abcdefgh", "yy")
    made = Combined(config, {"a": Says(len)}, Norm(), lambda: units(config, samples, tmp_path / "u.json"))
    scores = made.score(samples())
    assert sum(scores) == pytest.approx(0, abs=1e-9)
    assert sum(s * s for s in scores) / 4 == pytest.approx(1)
    made.score(samples())
    assert samples.drawn == 3
