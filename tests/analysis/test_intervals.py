from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from analysis.stats import Interval, interval, split_missing
from analysis.stats.bootstrap import FEWEST_SEEDS, studentised


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


def sampling_error(n_trials: int, p: float = 0.95) -> float:
    """Four standard errors of a proportion."""
    return 4 * math.sqrt(p * (1 - p) / n_trials)


@pytest.mark.parametrize("n", [5, 10])
def test_the_bootstrap_covers_normal_and_skewed_values_where_student_t_covers_the_normal_only(n: int) -> None:
    n_trials = 2000
    rng = np.random.default_rng(n)
    normal, skewed = rng.normal(0.7, 0.05, (n_trials, n)), 1 - rng.beta(0.5, 5, (n_trials, n))
    for values, mean, slack in ((normal, 0.7, 0.005), (skewed, 1 - 0.5 / 5.5, 0.025)):
        low, high = studentised(values)
        covered = np.mean((low <= mean) & (mean <= high))
        assert abs(covered - 0.95) < sampling_error(n_trials) + slack
    half = scipy.stats.t.ppf(0.975, n - 1) * skewed.std(1, ddof=1) / math.sqrt(n)
    assert np.mean(np.abs(skewed.mean(1) - (1 - 0.5 / 5.5)) <= half) < 0.91


def test_the_bootstrap_gives_no_interval_from_few_seeds_and_none_of_width_from_equal_ones() -> None:
    low, high = studentised(np.random.default_rng(0).normal(size=(3, FEWEST_SEEDS - 1)))
    assert np.isnan([low, high]).all()
    low, high = studentised(np.full((1, FEWEST_SEEDS), 0.1))
    assert (low[0], high[0]) == pytest.approx((0.1, 0.1))
    values = np.random.default_rng(1).normal(size=(2, 8))
    assert (studentised(values)[0] == studentised(values)[0]).all()
    assert studentised(values[1:])[0][0] == pytest.approx(
        studentised(values)[0][1]
    )  # does not depend on the other groups
