"""Figures about rollouts, and rollouts on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tests import tiny

from ppolite.config import PPO, Data, Train
from ppolite.models.roles import build_roles
from ppolite.models.trunk import Trunk
from ppolite.rollout.evaluate import before_and_after, distance
from ppolite.rollout.experience import make_experience
from ppolite.rollout.local import LocalGenerator
from ppolite.rollout.record import write_rollouts
from ppolite.types import Finish, Prompt, Rollout, Sampling

CONFIG = PPO(prompts=Data(path="unused"), rollouts=4, max_new_tokens=5)


def made() -> tuple[Any, list[Rollout]]:
    roles = build_roles(Trunk(tiny.model(), 2), Train(kind="lora", lora_rank=2), None)
    with torch.no_grad():
        for p in roles.policy.trained():
            p.add_(0.05)
    prompts = [Prompt(text=tiny.words(row)) for row in tiny.rows(shared=2)[0]]
    stops = frozenset({tiny.END, 11, 12})
    return roles, LocalGenerator(roles.policy, tiny.tokenizer(), stops).generate(prompts, Sampling(5), seed=0)


def test_distance_is_the_log_ratio_of_the_whole_response() -> None:
    roles, rollouts = made()
    for r, nats in zip(rollouts, distance(roles, rollouts, CONFIG), strict=True):
        with torch.no_grad():
            ref = tiny.logprobs(tiny.model(), r.prompt_ids, r.response_ids)
        assert nats == pytest.approx(float((r.logprobs_R - ref).sum()), abs=1e-4)


def test_rollouts_on_disk(tmp_path: Path) -> None:
    roles, rollouts = made()
    experience, _ = make_experience(roles, rollouts, [1.0, 2.0, 3.0, 4.0], CONFIG, 0.1)
    after_BR = experience.logprobs_BR + torch.where(experience.mask_BR, 0.5, 0.0)
    path = write_rollouts(tmp_path, 7, experience, after_BR, tiny.tokenizer())
    assert path == tmp_path / "rollouts" / "step-00007.parquet"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    rows = pq.read_table(path).to_pylist()
    assert [row["score"] for row in rows] == [1.0, 2.0, 3.0, 4.0]
    for row, r in zip(rows, rollouts, strict=True):
        n = len(r.response_ids)
        assert {len(row[key]) for key in row if isinstance(row[key], list)} == {n}
        assert row["ratio"] == pytest.approx([1.6487213] * n)
        assert row["sampler_logprobs"] == pytest.approx(row["old_logprobs"], rel=1e-5, abs=1e-5)
        assert (row["step"], row["response"], row["finish"]) == (7, r.text, r.finish)


def rollout(text: str, ids: int, finish: Finish) -> Rollout:
    return Rollout(Prompt(text="p"), [1], [7] * ids, text, torch.zeros(ids), finish)


def test_before_and_after_by_hand() -> None:
    before = [rollout("a b a b", 4, "length"), rollout("c d", 3, "stop")]
    after = [rollout("a b c", 4, "stop"), rollout("a b c", 4, "stop")]
    scores = SimpleNamespace(before=[0.0, 1.0], after=[2.0, 5.0])
    score = lambda rows: scores.before if rows is before else scores.after  # noqa: E731
    result = before_and_after(before, after, score, None, seed=0, samples=1)
    assert (result["score_before"], result["score_after"]) == (0.5, 3.5)
    low, high = result["score_gain_ci95"]
    assert 2.0 <= low <= 3.0 <= high <= 4.0
    assert (result["judge_before"], result["judge_after"], result["judge_gain_ci95"]) == (None, None, None)
    assert (result["length_before"], result["length_after"]) == (3.5, 4.0)
    assert (result["cut_share_before"], result["cut_share_after"]) == (0.5, 0.0)
    assert (result["distinct2_before"], result["distinct2_after"]) == (3 / 4, 2 / 4)
    assert result["prompts"] == 2
    assert result["samples"] == [
        {"prompt": "p", "before": "a b a b", "after": "a b c", "score_before": 0.0, "score_after": 2.0}
    ]
