"""Alarms: each threshold by a row that is beyond it, what they are relative to, and what a watcher remembers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ppolite.config import Watch
from ppolite.obs.metrics import repeated_share
from ppolite.obs.watch import Watcher

SOUND: dict[str, Any] = {
    "kl/ref_seq": 3.0,
    "policy/entropy": 2.0,
    "length/mean": 20.0,
    "text/repeats": 0.01,
    "policy/ratio_max": 4.0,
    "policy/clip_fraction": 0.2,
    "value/explained_variance": 0.4,
    "ess/share": 0.8,
    "heldout/score": 1.0,
    "heldout/judge": 0.3,
}
BEYOND = {
    "kl": ({"kl/ref_seq": 16.1}, "KL to the SFT model (kl/ref_seq) is 16.1, above 16"),
    "entropy": ({"policy/entropy": 0.59}, "entropy (policy/entropy) is 0.59, below 0.6"),
    "length": ({"length/mean": 50.1}, "mean length (length/mean) is 50.1, above 50"),
    "repeats": ({"text/repeats": 0.4}, "above 0.3"),
    "judge": (
        {"heldout/score": 1.5, "heldout/judge": 0.1},
        "fell to 0.1 from 0.3, while the score rose to 1.5",
    ),
    "ratio": ({"policy/ratio_max": 1e4}, "largest ratio π/π_old (policy/ratio_max) is 1e+04, above 1e+03"),
    "clip_fraction": ({"policy/clip_fraction": 0.7}, "above 0.6"),
    "explained_variance": ({"value/explained_variance": -3.0}, "is -3, below -2"),
    "ess": ({"ess/share": 0.05}, "is 0.05, below 0.1"),
}


def watcher(**config: Any) -> Watcher:
    made = Watcher(Watch(**{"patience": 1, **config}), max_kl=8.0)
    assert made.look(SOUND) == []
    return made


def test_every_threshold_has_its_row() -> None:
    assert {*BEYOND, "on_alarm", "patience"} == set(Watch.model_fields)


@pytest.mark.parametrize("name", BEYOND)
def test_a_figure_beyond_its_threshold(name: str) -> None:
    changes, said = BEYOND[name]
    alarms = watcher().look(SOUND | changes)
    assert [alarm.name for alarm in alarms] == [name]
    assert said in alarms[0].what
    assert watcher(**{name: None}).look(SOUND | changes) == []


def test_answers_may_also_shrink() -> None:
    assert [alarm.name for alarm in watcher().look(SOUND | {"length/mean": 7.9})] == ["length"]
    assert watcher().look(SOUND | {"length/mean": 8.1}) == []


def test_patience() -> None:
    bad = SOUND | BEYOND["kl"][0]
    seen = watcher(patience=3)
    rows = [bad, bad, SOUND, bad, bad, bad, bad, SOUND]
    assert [bool(seen.look(row)) for row in rows] == [False] * 5 + [True, True, False]
    seen = watcher(patience=2)
    looks = {"heldout/score", "heldout/judge"}
    quiet = {key: value for key, value in SOUND.items() if key not in looks}
    bad = SOUND | BEYOND["judge"][0]
    # Between two looks at held-out prompts the judge says nothing, for or against.
    assert [bool(seen.look(row)) for row in (bad, quiet, quiet, bad)] == [False, False, False, True]


def test_a_judge_that_falls_with_the_score_is_no_alarm() -> None:
    assert watcher().look(SOUND | {"heldout/score": 0.9, "heldout/judge": 0.1}) == []


def test_what_it_remembers_goes_through_json() -> None:
    bad = SOUND | BEYOND["length"][0] | BEYOND["judge"][0]
    first = watcher(patience=2)
    first.look(bad)
    second = Watcher(Watch(patience=2), max_kl=8.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (
        [alarm.name for alarm in second.look(bad)]
        == [alarm.name for alarm in first.look(bad)]
        == ["length", "judge"]
    )
    first.forget()
    assert first.look(bad) == []
    assert first.first["length/mean"] == 20


def test_repeated_text_by_hand() -> None:
    assert repeated_share([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(
        1 / 5
    )  # 5 sequences, one of them again
    assert repeated_share([[7] * 8, [1, 2, 3, 4, 5], [1, 2]]) == pytest.approx((4 / 5 + 0) / 2)
    assert repeated_share([[1, 2, 3]]) == 0.0


def test_the_defaults_on_runs_of_the_film_critic() -> None:
    """Rounds recorded by `experiments.leash`: silent where the leash holds, and only its alarm where it does not."""
    recorded = json.loads((Path(__file__).parents[2] / "docs/results/leash.json").read_text(encoding="utf-8"))
    alarms: dict[str, set[str]] = {}
    too_far: dict[str, set[str]] = {}
    for name, run in recorded["results"].items():
        watching = Watcher(Watch(), max_kl=7.0)
        alarms[name] = {alarm.name for row in run["steps"][1:] for alarm in watching.look(row)}
        held_out = [row["heldout/kl_ref_seq"] for row in run["steps"] if "heldout/kl_ref_seq" in row]
        too_far[name] = {"kl"} if max(held_out) > 2 * 7.0 else set()
    assert alarms == too_far
    assert alarms["clip-0.1"] == set()
    assert alarms["free-0"] == {"kl"}
