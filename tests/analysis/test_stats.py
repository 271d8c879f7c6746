from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from analysis.stats import Interval, interval, split_missing


@pytest.mark.parametrize("n", [2, 3, 5, 17])
def test_interval_agrees_with_scipy(n: int) -> None:
    values = np.random.default_rng(n).normal(3.0, 2.0, n)
    found = interval(list(values))
    assert found is not None
    low, high = scipy.stats.t.interval(0.95, n - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high), rel=1e-12)
    assert found.n == n


@pytest.mark.parametrize("n", [2, 3, 5])
def test_interval_covers_the_true_mean_as_often_as_it_says(n: int) -> None:
    n_trials = 4000
    samples = np.random.default_rng(0).normal(0.7, 0.05, (n_trials, n))
    intervals = [interval(list(row)) for row in samples]
    covered = sum(found.low <= 0.7 <= found.high for found in intervals)
    # four standard errors of a binomial proportion
    assert abs(covered / n_trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / n_trials)


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    assert interval([0.5]) == Interval(0.5, None, None, 1)
    assert interval([]) is None


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert interval([0.1, 0.1, 0.1]) == Interval(pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1), 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_finite_is_refused_or_counted_but_never_averaged(bad: float | None) -> None:
    with pytest.raises(ValueError, match="finite"):
        interval([0.5, bad])
    assert split_missing([0.5, bad, 1, bad]) == ([0.5, 1.0], 2)
