"""Numbers from scipy, from hand counts, and from the normal theory of a mean."""

import math

import numpy as np
import pytest
from scipy import stats

from ppolite.obs.metrics import bootstrap_mean_ci, calibration, distinct_n, pearson, ranks, spearman


@pytest.fixture
def tied() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    x = rng.integers(0, 6, 200).astype(float)
    return x, (x + rng.integers(-3, 4, 200)) ** 3


def test_correlations_equal_scipy(tied):
    x, y = tied
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    np.testing.assert_array_equal(ranks(y), stats.rankdata(y))


def test_order_is_all_that_spearman_sees():
    x = [0.1, 2.0, 3.0, 40.0]
    assert spearman(x, [math.exp(v) for v in x]) == 1.0
    assert spearman(x, [-v for v in x]) == -1.0


@pytest.mark.parametrize(("x", "y"), [([1, 1, 1], [1, 2, 3]), ([1], [2]), ([], [])])
def test_correlation_without_variation_is_nan(x, y):
    assert math.isnan(pearson(x, y))
    assert math.isnan(spearman(x, y))


def test_a_constant_that_rounding_would_spread_is_still_constant():
    assert math.isnan(pearson([0.1] * 10, range(10)))


def test_bootstrap_agrees_with_scipy_and_normal_theory():
    x = np.random.default_rng(0).normal(1.0, 2.0, 400)
    lo, hi = bootstrap_mean_ci(x, seed=1)
    theirs = stats.bootstrap((x,), np.mean, method="percentile", n_resamples=10_000, rng=5)
    assert (lo, hi) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)
    half = 1.96 * x.std() / 20
    assert (lo, hi) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.01)


def test_bootstrap_is_reproducible_and_widens_with_level():
    x = np.arange(30.0)
    assert bootstrap_mean_ci(x, seed=4, draws=999) == bootstrap_mean_ci(x, seed=4, draws=999)
    lo90, hi90 = bootstrap_mean_ci(x, level=0.90)
    lo99, hi99 = bootstrap_mean_ci(x, level=0.99)
    assert lo99 < lo90 < x.mean() < hi90 < hi99
    assert bootstrap_mean_ci([2.5]) == (2.5, 2.5)


def test_bootstrap_refuses_what_has_no_mean():
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean_ci([])
    with pytest.raises(ValueError, match=r"x\[1\] is not finite"):
        bootstrap_mean_ci([0.0, math.nan])


def test_distinct_n_counted_by_hand():
    # a b, b a, a b | a b  -> 2 distinct of 4; the n-gram never crosses from one text to the next
    assert distinct_n(["a b a b", "a b", "a"], 2) == 2 / 4
    assert distinct_n(["a b a b", "a b", "a"], 1) == 2 / 7
    assert distinct_n(["one", ""], 2) == 0.0


def test_calibration_by_hand():
    pred, target = [4.0, 1.0, 3.0, 2.0, 5.0], [40.0, 10.0, 30.0, 20.0, 60.0]
    assert calibration(pred, target, bins=2) == [(2.0, 20.0, 3), (4.5, 50.0, 2)]
    assert calibration([1.0], [2.0], bins=10) == [(1.0, 2.0, 1)]
    assert calibration([], [], bins=3) == []
    with pytest.raises(ValueError, match="one length"):
        calibration([1.0], [1.0, 2.0])
