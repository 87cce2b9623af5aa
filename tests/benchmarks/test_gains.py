"""What `gains` takes away from a step costs operations, or time alone, and never changes the result."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from benchmarks.floor import Phase, measured
from benchmarks.gains import WAYS, Round
from tests.world import World

from ppolite import PPO

UNDONE = [name for name, way in WAYS.items() if not way.setting]
TIME_ALONE = {"prepacked weights"}


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
    else:
        assert counted[True] > counted[False]


def test_counting_is_no_timing(begun: Round) -> None:
    phase = Phase()
    with measured(phase, count=True):
        begun.ppo.score(begun.rollouts)
    assert phase.executed > 0
    assert phase.seconds == 0
