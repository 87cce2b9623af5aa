"""Sets of prompts for a generator, the first as a warm-up, and what is said of the answers."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.workers import common


class Sets:
    """Iterate, and call `done` with the answers' token ids, EOS included, before the next set."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.sets = json.loads(Path(spec["prompts"]).read_text())
        self.keep = spec["keep"]
        self.seconds: list[float] = []
        self.answers: list[list[list[int]]] = []

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for given in self.sets:
            common.wait()
            self.started = time.perf_counter()
            yield given

    def done(self, answers: list[list[int]]) -> None:
        common.wait()
        self.seconds.append(time.perf_counter() - self.started)
        self.answers.append(answers)

    def report(self, *packages: str) -> None:
        """Medians over the sets after the first; the answers go into a file, to be judged."""
        tokens = [sum(map(len, answers)) for answers in self.answers[1:]]
        seconds = self.seconds[1:]
        Path(self.keep).write_text(json.dumps(self.answers[1:]))
        common.report(
            *packages,
            seconds=statistics.median(seconds),
            tokens_per_s=statistics.median(n / s for n, s in zip(tokens, seconds, strict=True)),
            length=sum(tokens) / sum(map(len, self.answers[1:])),
        )
