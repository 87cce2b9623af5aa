"""Running statistics against numpy's over everything at once."""

from __future__ import annotations

import numpy as np
import pytest

from ppolite.control.units import CUT, ObsNorm, RewardScale, Running


@pytest.mark.parametrize("sizes", [[1, 1, 1], [8, 8], [1, 5, 30, 2]])
def test_running_is_numpy_over_all_rows(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    parts = [1e4 + 3 * rng.standard_normal((n, 4)) for n in sizes]
    seen = Running((4,))
    for part in parts:
        seen.update(part)
    rows = np.concatenate(parts)
    np.testing.assert_allclose(seen.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(seen.var, rows.var(0), rtol=1e-9)


def test_observations_are_normalised_and_cut() -> None:
    rng = np.random.default_rng(1)
    obs = rng.normal([5, -3], [2, 0.1], (1000, 2))
    norm = ObsNorm(2)
    out = norm(obs, update=True)
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(out.std(0), 1, atol=1e-5)
    mean, var = norm.seen.mean.copy(), norm.seen.var.copy()
    assert norm(np.array([[1e6, -1e6]])).tolist() == [[CUT, -CUT]]
    np.testing.assert_array_equal(norm.seen.mean, mean)  # looking is not counting
    np.testing.assert_array_equal(norm.seen.var, var)


def test_a_new_norm_leaves_observations_alone_but_for_the_cut() -> None:
    np.testing.assert_allclose(ObsNorm(2)(np.array([[0.5, 20.0]])), [[0.5, CUT]], rtol=1e-7)


def test_rewards_are_scaled_by_the_deviation_of_the_running_return() -> None:
    rng = np.random.default_rng(2)
    rewards, ended = rng.normal(3, 2, (50, 2)), rng.random((50, 2)) < 0.2
    gamma, scale = 0.9, RewardScale(2, 0.9)
    sums, seen = np.zeros(2), []
    for r, e in zip(rewards, ended, strict=True):
        got = scale(r, e)
        sums = gamma * sums + r
        seen += sums.tolist()
        sums = np.where(e, 0, sums)
        np.testing.assert_allclose(got, np.clip(r / np.sqrt(np.var(seen) + 1e-8), -CUT, CUT), rtol=1e-9)
