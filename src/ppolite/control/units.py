"""Observations and rewards in running units: statistics of all that was seen so far.

Axes: N environments, D observation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

CUT = 10.0
"""Normalised observations and rewards are cut at ± this."""
EPS = 1e-8


class Running:
    """Mean and variance (ddof 0) of all rows seen so far (Chan, Golub & LeVeque 1983), in float64."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = 0
        self.mean = np.zeros(shape)
        self.var = np.ones(shape)
        """1 until there is something to go by."""
        self._squares = np.zeros(shape)

    def update(self, rows: Floats) -> None:
        n = len(rows)
        total = self.count + n
        mean = rows.mean(axis=0, dtype=np.float64)
        ahead = mean - self.mean
        self.mean = self.mean + ahead * (n / total)
        self._squares += np.square(rows - mean).sum(axis=0) + np.square(ahead) * (self.count * n / total)
        self.count = total
        self.var = self._squares / total


class ObsNorm:
    """(x − mean) / √(var + 1e-8), cut at ±10. `update` is off in evaluation."""

    def __init__(self, size: int) -> None:
        self.seen = Running((size,))

    def __call__(self, obs_ND: Floats, *, update: bool = False) -> Floats:
        if update:
            self.seen.update(obs_ND)
        return np.clip((obs_ND - self.seen.mean) / np.sqrt(self.seen.var + EPS), -CUT, CUT)


class RewardScale:
    """r / √(var R + 1e-8), cut at ±10, with R ← γR + r the discounted sum so far of the running episode.

    The mean stays: taking it away would reward or punish staying alive.
    """

    def __init__(self, count: int, gamma: float) -> None:
        self.gamma = gamma
        self.seen = Running(())
        self._sums_N = np.zeros(count)

    def __call__(self, rewards_N: Floats, ended_N: NDArray[np.bool_]) -> Floats:
        self._sums_N = self._sums_N * self.gamma + rewards_N
        self.seen.update(self._sums_N)
        self._sums_N[ended_N] = 0.0
        return np.clip(rewards_N / np.sqrt(self.seen.var + EPS), -CUT, CUT)
