"""What `gains` takes away from a step costs operations, or time alone, and never changes the result."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from benchmarks.floor import Phase, measured
from benchmarks.gains import WAYS, Round
from tests.world import World

from ppolite import PPO

UNDONE = [name for name, way in WAYS.items() if not way.setting]
TIME_ALONE = {"prepacked weights"}
WIDER = {"rows in packs"}
"""Attention over 128 places of a pack, which is most of what a model of width 32 does."""


@pytest.fixture(scope="module")
def begun(world: World, finished_run: Path) -> Round:
    return Round.of(PPO(world.recipe(ppo__epochs=1), finished_run))


def result(begun: Round) -> tuple[list[list[int]], dict[str, float]]:
    """Answers of the start, and the metrics of a step on the round's."""
    ppo = begun.begin()
    answers = [rollout.response_ids for rollout in ppo.generate(begun.prompts)]
    return answers, ppo.step(begun.rollouts, ppo.score(begun.rollouts))


@pytest.mark.parametrize("name", UNDONE)
def test_the_same_result_by_more_work(begun: Round, name: str) -> None:
    way = WAYS[name]
    answers, metrics = result(begun)
    counted: dict[bool, float] = {}
    for off in (False, True):
        with way.off(begun.ppo) if off else nullcontext():
            same = result(begun)
            phases = begun.run(way.phases, count=True)
        assert same == (answers, pytest.approx(metrics, rel=1e-3, abs=1e-5))
        assert list(phases) == list(way.phases)
        counted[off] = sum(phase.executed for phase in phases.values())
    if name in TIME_ALONE:
        assert counted[True] == counted[False]
    elif name in WIDER:
        assert counted[True] < counted[False]
    else:
        assert counted[True] > counted[False]


def test_attention_is_counted() -> None:
    """5 queries and 7 keys of width 4 in 6 heads: 2 products forward, 5 backward, of 2 operations a pair and number."""
    q, k, v = (torch.randn(2, 3, n, 4, requires_grad=True) for n in (5, 7, 7))
    phase = Phase()
    with measured(phase, count=True):
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    assert phase.executed == (2 + 5) * 2 * 6 * 5 * 7 * 4


def test_counting_is_no_timing(begun: Round) -> None:
    phase = Phase()
    with measured(phase, count=True):
        begun.ppo.score(begun.rollouts)
    assert phase.executed > 0
    assert phase.seconds == 0
