"""Statistics that an evaluation reports: agreement, intervals, diversity. numpy only.

Left out: significance tests. A table shows an interval and how many prompts stand behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_DRAWS_AT_ONCE = 250
"""Bootstrap draws held in memory together: 250 × 10,000 prompts is 20 MB of indices."""


class Bin(NamedTuple):
    """One group of a calibration: what was predicted, what came true, how many."""

    mean_pred: float
    mean_target: float
    n: int


def bootstrap_mean_ci(
    x: ArrayLike, *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979), resampling the items of `x` with replacement.

    For a paired gain pass the differences, one a prompt: prompts are what varies. Raises ValueError on an
    empty or non-finite `x`.
    """
    values = _finite(x, "x")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number between 0 and 1")
    rng = np.random.default_rng(seed)
    means = [
        values[rng.integers(values.size, size=(min(_DRAWS_AT_ONCE, draws - done), values.size))].mean(axis=1)
        for done in range(0, draws, _DRAWS_AT_ONCE)
    ]
    tail = (1 - level) / 2
    lo, hi = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(lo), float(hi)


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Linear correlation, −1..1; nan where either side does not vary."""
    a, b = _pair(x, y)
    if a.size < 2 or a.min() == a.max() or b.min() == b.max():
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1.0, 1.0))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation, −1..1; ties share their mean rank; nan where either side does not vary."""
    a, b = _pair(x, y)
    return pearson(ranks(a), ranks(b))


def ranks(x: ArrayLike) -> Floats:
    """Ranks from 1; equal values share the mean of the ranks they take up."""
    _, which, counts = np.unique(np.asarray(x, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def repeated_share(rows: Iterable[Sequence[int]], n: int = 4) -> float:
    """Share of the n-token sequences of each row that stand in it before; the mean over rows that have any. 0..1."""
    shares: list[float] = []
    for row in rows:
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Distinct n-grams over all n-grams of the whole set (Li et al. 2016), on whitespace words; 0 if none.

    Falls with the amount of text, so compare sets of about one size. Chinese has no spaces: insert them, or
    read the number as one of repeated lines.
    """
    total, seen = 0, set[tuple[str, ...]]()
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        total += len(grams)
        seen.update(grams)
    return len(seen) / total if total else 0.0


def calibration(pred: ArrayLike, target: ArrayLike, bins: int = 10) -> list[Bin]:
    """Predictions sorted and cut into `bins` groups of nearly equal size, with both means of each.

    A calibrated model has `mean_pred ≈ mean_target` in every row. Fewer items than bins give fewer rows.
    """
    p, t = _pair(pred, target)
    order = np.argsort(p, kind="stable")
    groups = np.array_split(order, min(bins, order.size)) if order.size else []
    return [Bin(float(p[g].mean()), float(t[g].mean()), int(g.size)) for g in groups]


def _finite(x: ArrayLike, name: str) -> Floats:
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} has shape {values.shape}; expected a list of at least one number")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}[{int(np.argmin(np.isfinite(values)))}] is not finite")
    return values


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape}; expected two lists of one length")
    return a, b
