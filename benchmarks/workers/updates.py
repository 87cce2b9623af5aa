"""Updates on given batches, timed: what is said of them on both sides."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.workers import common


class Updates:
    """`begin()`, then `done(loss)` after each update; the first `warmup` do not count."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.warmup = spec["warmup"]
        self.batches: list[list[Any]] = json.loads(Path(spec["batches"]).read_text())
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def begin(self) -> None:
        common.wait()
        self.started = time.perf_counter()

    def done(self, loss: float | None = None) -> None:
        common.wait()
        now = time.perf_counter()
        self.seconds.append(now - self.started)
        self.started = now
        if loss is not None:
            self.losses.append(loss)

    def report(self, *packages: str, **figures: Any) -> None:
        counted, seconds = self.batches[self.warmup :], sum(self.seconds[self.warmup :])
        tokens = sum(_tokens(row) for batch in counted for row in batch)
        common.report(
            *packages,
            tokens_per_s=tokens / seconds,
            tokens=tokens,
            updates=len(counted),
            seconds=seconds,
            losses=self.losses,
            **figures,
        )


def _tokens(row: Sequence[Any]) -> int:
    """Ids in nested lists: of prompt and answer, or of several such."""
    return sum(_tokens(part) if isinstance(part, list) else 1 for part in row)
