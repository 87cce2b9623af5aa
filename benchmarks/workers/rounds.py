"""The clock of both sides' PPO: seconds of each round, stopped while somebody looks at the policy."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.workers.common import ask, wait


class Clock:
    """`begin()`, then `lap(…)` at the end of each round.

    With `every`, every so many rounds the policy is saved to `folder`, and the harness looks at it and says whether
    there is to be `more`; this costs nothing on the clock.
    """

    def __init__(self, told: dict[str, Any], save: Callable[[str], Any]) -> None:
        self.warmup, self.every, self.folder, self.save = told["warmup"], told["every"], told["folder"], save
        self.rows: list[dict[str, float]] = []
        self.looks: list[dict[str, float]] = []

    def begin(self) -> None:
        wait()
        self.started = time.perf_counter()

    def lap(self, **figures: float) -> bool:
        """Note a round; whether there is to be another."""
        wait()
        self.rows.append({"step_s": time.perf_counter() - self.started, **figures})
        more = True
        if self.every and len(self.rows) % self.every == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.save(self.folder)
            seconds = sum(row["step_s"] for row in self.rows)
            look = ask({"round": len(self.rows), "seconds": seconds, "policy": self.folder})
            self.looks.append(look)
            more = look["more"]
        self.started = time.perf_counter()
        return more

    def figures(self) -> dict[str, Any]:
        """Medians over the rounds after the warm-up, these rounds, and the looks with the last one's figures."""
        rows = self.rows[self.warmup :]
        medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        last = self.looks[-1] if self.looks else {}
        return {**medians, "rounds": rows, **last, "looks": self.looks}
