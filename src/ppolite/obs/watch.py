"""Alarms: a policy that goes where nobody would follow, noticed while it trains.

    watcher = Watcher(recipe.watch, max_kl=8.0)
    for alarm in watcher.look(row): ...             row: one step's metrics

A figure must be beyond its threshold for `patience` steps in a row. What a threshold is relative to (the first step,
the best look so far) is all that a watcher remembers, as plain numbers, for the checkpoint. A figure that a row lacks
says nothing: the judge speaks only where held-out prompts are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ppolite.config import Watch

Row = Mapping[str, Any]


class Alarm(NamedTuple):
    """One figure beyond its threshold."""

    name: str
    """The threshold's key in `watch`."""
    what: str


@dataclass
class Watcher:
    """What a run's figures have been, as far as alarms depend on it."""

    config: Watch
    max_kl: float
    first: dict[str, float] = field(default_factory=dict[str, float])
    """Of the first step: entropy and length."""
    best: dict[str, float] = field(default_factory=dict[str, float])
    """Of the looks at held-out prompts: score and judge."""
    streaks: dict[str, int] = field(default_factory=dict[str, int])
    """Steps in a row beyond each threshold."""

    def look(self, row: Row) -> list[Alarm]:
        """Alarms that this step gives, in the order of the recipe's keys."""
        for key in ("policy/entropy", "length/mean"):
            if key in row:
                self.first.setdefault(key, row[key])
        alarms: list[Alarm] = []
        for name, what in self._beyond(row).items():
            self.streaks[name] = self.streaks.get(name, 0) + 1 if what else 0
            if self.streaks[name] >= self.config.patience:
                alarms.append(Alarm(name, what))
        for key in ("heldout/score", "heldout/judge"):
            if key in row:
                self.best[key] = max(self.best.get(key, row[key]), row[key])
        return alarms

    def forget(self) -> None:
        """The best policy is back in place: what led to the alarms is undone."""
        self.streaks.clear()

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"first": dict(self.first), "best": dict(self.best), "streaks": dict(self.streaks)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        self.first, self.best = dict(state["first"]), dict(state["best"])
        self.streaks = {name: int(steps) for name, steps in state["streaks"].items()}

    def _beyond(self, row: Row) -> dict[str, str]:
        """For each figure that is watched and in the row: what is wrong with it, or nothing."""
        c = self.config
        checks = {
            "kl": _above(row, "kl/ref_seq", c.kl and c.kl * self.max_kl, "KL to the SFT model"),
            "entropy": _below(row, "policy/entropy", self._share("policy/entropy", c.entropy), "entropy"),
            "length": self._length(row),
            "repeats": _above(row, "text/repeats", c.repeats, "share of repeated text"),
            "judge": self._judge(row),
            "ratio": _above(row, "policy/ratio_max", c.ratio, "largest ratio π/π_old"),
            "clip_fraction": _above(row, "policy/clip_fraction", c.clip_fraction, "clip fraction"),
            "explained_variance": _below(
                row, "value/explained_variance", c.explained_variance, "critic's explained variance"
            ),
            "ess": _below(row, "ess/share", c.ess, "effective share of the samples"),
        }
        return {name: what for name, what in checks.items() if what is not None}

    def _share(self, key: str, share: float | None) -> float | None:
        return None if share is None or key not in self.first else share * self.first[key]

    def _length(self, row: Row) -> str | None:
        factor, key = self.config.length, "length/mean"
        long = _above(row, key, self._share(key, factor), "mean length")
        return long or _below(row, key, self._share(key, factor and 1 / factor), "mean length")

    def _judge(self, row: Row) -> str | None:
        drop = self.config.judge
        if drop is None or "heldout/judge" not in row or "heldout/score" not in row:
            return None
        judge, score = row["heldout/judge"], row["heldout/score"]
        best_judge, best_score = (self.best.get(f"heldout/{name}") for name in ("judge", "score"))
        if best_judge is None or best_score is None or judge >= best_judge - drop or score < best_score:
            return ""
        return f"the judge fell to {judge:.3g} from {best_judge:.3g}, while the score rose to {score:.3g}"


def _above(row: Row, key: str, limit: float | None, name: str) -> str | None:
    if limit is None or key not in row:
        return None
    return f"{name} ({key}) is {row[key]:.3g}, above {limit:.3g}" if row[key] > limit else ""


def _below(row: Row, key: str, limit: float | None, name: str) -> str | None:
    if limit is None or key not in row:
        return None
    return f"{name} ({key}) is {row[key]:.3g}, below {limit:.3g}" if row[key] < limit else ""
