"""One step of PPO by ppolite, each answer as long as it may be: seconds and operations of its phases.

With `ceilings`, the chip's, and the bytes that generating cannot do without reading.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.floor import Shape, Tokens, ceilings, look
from benchmarks.workers.common import report, told
from ppolite import PPO, load_recipe
from ppolite.models.footprint import cache_size
from ppolite.types import Rollout


class Nothing:
    """Scores that take no time."""

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [0.0] * len(rollouts)


def reads(ppo: PPO, shape: Shape, tokens: Tokens) -> float:
    """Bytes of a generation: weights once for each token of answers that are drawn together, each answer's keys and
    values once for each of its tokens, at half of its length."""
    model: Any = ppo.opened.model
    dtype, R = ppo.opened.dtype, tokens.padded_response
    waves = -(-tokens.rows // ppo.recipe.decode_rows)
    weights = (shape.whole + shape.head) / 2 * dtype.itemsize
    return R * (
        waves * weights + tokens.rows * cache_size(model.config, tokens.padded_prompt + R // 2, dtype)
    )


def main() -> None:
    spec = told()
    with tempfile.TemporaryDirectory() as folder:
        ppo = PPO(load_recipe("film", spec["overrides"]), folder, scorer=Nothing())
        ppo.generator.stop_ids = frozenset()
        shape = Shape.of(ppo)
        phases, tokens = look(ppo, shape)
        limits: dict[str, Any] = {}
        if spec.get("ceilings"):
            tops = ceilings(ppo.opened.dtype, ppo.opened.device, shape)
            limits = {"ceilings": tops, "generate_bytes": reads(ppo, shape, tokens)}
    report(
        "transformers",
        "peft",
        seconds={name: phase.seconds for name, phase in phases.items()},
        tflop={name: phase.executed / 1e12 for name, phase in phases.items()},
        needed_tflop={name: phase.needed / 1e12 for name, phase in phases.items()},
        tokens=vars(tokens),
        **limits,
    )


if __name__ == "__main__":
    main()
