"""One step of PPO by ppolite, each answer as long as it may be: seconds and operations of its phases."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from benchmarks.floor import Shape, look
from benchmarks.workers.common import report, told
from ppolite import PPO, load_recipe
from ppolite.types import Rollout


class Nothing:
    """Scores that take no time."""

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [0.0] * len(rollouts)


def main() -> None:
    spec = told()
    with tempfile.TemporaryDirectory() as folder:
        ppo = PPO(load_recipe("film", spec["overrides"]), folder, scorer=Nothing())
        ppo.generator.stop_ids = frozenset()
        phases, tokens = look(ppo, Shape.of(ppo))
    report(
        "transformers",
        "peft",
        seconds={name: phase.seconds for name, phase in phases.items()},
        tflop={name: phase.executed / 1e12 for name, phase in phases.items()},
        tokens=vars(tokens),
    )


if __name__ == "__main__":
    main()
