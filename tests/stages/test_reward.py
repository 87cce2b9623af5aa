"""The reward model's three losses by hand, its units, and what its result means in plain transformers."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.world import World, write_rows
from transformers import AutoModelForSequenceClassification

from ppolite.stages.reward import RewardModel
from ppolite.types import UserError


def make(world: World, folder: Path, kind: str, **changes: Any) -> RewardModel:
    name = {"scores": "scored"}.get(kind, kind)
    return RewardModel(
        world.recipe(reward__kind=kind, reward__data__path=world.path(name), **changes), folder
    )


def plain_scores(rm: RewardModel, rows: list[Any]) -> list[list[float]]:
    """Head on the last token, through the untouched model one response at a time, in float64."""
    assert rm.body.score is not None
    weight = rm.body.score.weight.detach().double()[0]
    decoder = rm.opened.model.base_model
    out = []
    for row in rows:
        scores = []
        for prompt, answer in row.encoded:
            with torch.no_grad():
                hidden = decoder(torch.tensor([prompt + answer])).last_hidden_state[0, -1]
            scores.append(float(hidden.double() @ weight))
        out.append(scores)
    return out


def by_hand(rm: RewardModel, rows: list[Any]) -> float:
    if rm.config.kind == "scores":  # the variance of what is left, as the best intercept takes its mean away
        left = [
            (r.target - rm.mean) / rm.scale - s[0] for r, s in zip(rows, plain_scores(rm, rows), strict=True)
        ]
        return sum((x - sum(left) / len(left)) ** 2 for x in left) / len(left)
    losses = []
    for row, scores in zip(rows, plain_scores(rm, rows), strict=True):
        if rm.config.kind == "pairs":
            losses.append(math.log1p(math.exp(-(scores[0] - scores[1] - row.target))))
        else:
            losses.append(
                sum(math.log(sum(math.exp(s) for s in scores[k:])) - scores[k] for k in range(len(scores)))
            )
    return sum(losses) / len(losses)


@pytest.mark.parametrize("budget", [4096, 50])
@pytest.mark.parametrize("kind", ["scores", "pairs", "rankings"])
def test_loss_by_hand(kind: str, budget: int, world: World, tmp_path: Path) -> None:
    rm = make(world, tmp_path, kind, reward__optim__micro_batch_tokens=budget)
    rows = rm.train[:9]
    expected = by_hand(rm, rows)
    assert rm.loss(rows) == pytest.approx(expected, rel=1e-4)
    assert rm.learner.clip() > 0
    assert by_hand(make(world, tmp_path, kind), rows) == pytest.approx(expected)


def test_margins_count(world: World, tmp_path: Path) -> None:
    rows = [json.loads(line) | {"margin": 2.0} for line in Path(world.path("pairs")).read_text().splitlines()]
    path = write_rows(tmp_path / "m.jsonl", rows)
    plain, wide = (
        make(world, tmp_path, "pairs"),
        RewardModel(world.recipe(reward__kind="pairs", reward__data__path=str(path)), tmp_path),
    )
    expected = by_hand(wide, wide.train[:8])
    loss = wide.loss(wide.train[:8])
    assert loss == pytest.approx(expected, rel=1e-4)
    assert loss > plain.loss(plain.train[:8]) + 0.5


@pytest.mark.parametrize("kind", ["scores", "pairs", "rankings"])
def test_it_learns_peoples_taste(kind: str, world: World, tmp_path: Path) -> None:
    report = make(world, tmp_path, kind, reward__epochs=6.0).run()
    assert report["pair_accuracy"] > 0.65
    assert report["held_out"] >= 8


def test_result_is_a_classifier_in_peoples_units(world: World, tmp_path: Path) -> None:
    rm = make(world, tmp_path, "scores")
    report = rm.run()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    norm = model.config.ppolite_norm
    predicted = []
    for row in rm.held:
        ((prompt, answer),) = row.encoded
        with torch.no_grad():
            predicted.append(model(torch.tensor([prompt + answer])).logits.item() + norm["offset"])
    targets = [row.target for row in rm.held]
    # The same agreement, from the saved weights: Pearson by its definition.
    x, y = torch.tensor(predicted).double(), torch.tensor(targets).double()
    x, y = x - x.mean(), y - y.mean()
    assert float(x @ y / (x.norm() * y.norm())) == pytest.approx(report["pearson"], rel=1e-3)
    assert json.loads((tmp_path / "reward" / "agreement.json").read_text()) == report
    assert abs(sum(predicted) / len(predicted) - sum(targets) / len(targets)) < 1
    assert all(a[0] <= b[0] for a, b in pairwise(report["calibration"]))


def test_normalised_on_samples_of_the_sft_model(world: World, finished_run: Path, tmp_path: Path) -> None:
    """Fresh samples of the SFT model score about 0 ± 1 with the norm that the run wrote down."""
    (tmp_path / "sft").symlink_to(finished_run / "sft")
    rm = make(world, tmp_path, "scores", reward__norm_samples=120)
    rm.run()
    norm = json.loads((tmp_path / "reward" / "config.json").read_text())["ppolite_norm"]
    mean, std = rm.on_samples(norm["offset"])
    assert (mean, std) == pytest.approx((norm["mean"], norm["std"]))
    other = RewardModel(world.recipe(seed=5, reward__norm_samples=120), tmp_path)
    other.body = rm.body
    mean, std = other.on_samples(norm["offset"])
    assert abs(mean - norm["mean"]) < 0.3 * norm["std"]
    assert 0.7 < std / norm["std"] < 1.4


def test_agreement_that_is_no_number_is_null(world: World, tmp_path: Path) -> None:
    rm = make(world, tmp_path, "scores")
    assert rm.body.score is not None
    with torch.no_grad():
        rm.body.score.weight.zero_()
    report = rm.agreement()
    assert report["pearson"] is None
    assert report["spearman"] is None
    assert report["pair_accuracy"] == 0.5
    json.dumps(report, allow_nan=False)


def test_rows_that_cannot_be_rated_are_refused(world: World, tmp_path: Path) -> None:
    rows = [
        json.loads(line) | {"score": None} for line in Path(world.path("scored")).read_text().splitlines()
    ]
    path = write_rows(tmp_path / "unrated.jsonl", rows)
    with pytest.raises(UserError, match=r"unrated\.jsonl.*'score' is empty"):
        RewardModel(world.recipe(reward__data__path=str(path)), tmp_path)


def test_agreement_of_each_origin(world: World, tmp_path: Path) -> None:
    """The parts of a file that was joined of several, each measured by itself."""
    pairs = [json.loads(line) for line in Path(world.path("pairs")).read_text().splitlines()]
    names = ["a", "b", "b"]
    joined = [row | {"origin": names[i % 3]} for i, row in enumerate(pairs)]
    path = write_rows(tmp_path / "joined.jsonl", joined)
    rm = RewardModel(world.recipe(reward__kind="pairs", reward__data__path=str(path)), tmp_path)
    report = rm.agreement()
    told = {(p["prompt"], p["chosen"]): p["origin"] for p in joined}
    right: dict[str, list[bool]] = {"a": [], "b": []}
    for row, (chosen, rejected) in zip(rm.held, plain_scores(rm, rm.held), strict=True):
        text = rm.opened.tokenizer.decode(row.encoded[0][1], skip_special_tokens=True)
        right[told[row.prompt.last, text]].append(chosen > rejected)
    assert report["by_origin"] == {k: [pytest.approx(sum(v) / len(v)), len(v)] for k, v in right.items()}
    plain = RewardModel(world.recipe(reward__kind="pairs", reward__data__path=world.path("pairs")), tmp_path)
    assert "by_origin" not in plain.agreement()
