from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from analysis.pareto_probability import pareto_probabilities
from analysis.seeds import seed_tables
from analysis.stats.front import front_probability
from tests.analysis.test_comparison import SAVED, row

CHEAP_AND_DEAR = np.array([1.0, 2.0])


def of_two(y: np.ndarray, n_draws: int = 2000) -> np.ndarray:
    """The second arm costs more: it is on the front where it is better."""
    return front_probability(np.tile(CHEAP_AND_DEAR, (len(y), 1)), y, x_sign=-1, y_sign=1, n_draws=n_draws)


def test_of_two_arms_it_is_the_one_sided_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    for n, shift in ((3, 0.01), (3, -0.02), (5, 0.005), (8, 0.0)):
        shared = rng.normal(0, 0.3, (n, 1))
        y = shared + rng.normal(0, 0.02, (n, 2)) + [0.0, shift]
        cheap, dear = of_two(y, n_draws=40_000)
        expected = scipy.stats.ttest_rel(y[:, 1], y[:, 0], alternative="greater").pvalue
        assert cheap == 1.0
        assert dear == pytest.approx(1 - expected, abs=0.012)


@pytest.mark.parametrize("n", [3, 5])
def test_it_is_calibrated_where_resampling_seeds_is_too_sure(n: int) -> None:
    """Two equal arms: the dearer is on the front or not by a hair, and 90 % may be claimed in 1 of 10 cases."""
    n_trials = 1500
    rng = np.random.default_rng(n)
    values = rng.normal(0.8, 0.03, (n_trials, n, 2))
    claimed = np.array([of_two(y, n_draws=500)[1] for y in values])
    for level in (0.1, 0.5, 0.9):
        tolerance = 4 * math.sqrt(level * (1 - level) / n_trials) + 0.01
        assert abs((claimed <= level).mean() - level) < tolerance
    picks = rng.integers(0, n, (500, n))
    differences = values[:, :, 1] - values[:, :, 0]
    resampled = (differences[:, picks].mean(-1) > 0).mean(1)
    assert (resampled <= 0.1).mean() > 0.15


def test_missing_seeds_single_seeds_and_arms_without_any() -> None:
    nan = np.nan
    y = np.array([[0.5, 0.6, nan, 0.7], [0.5, 0.62, nan, nan], [0.5, nan, nan, nan]])
    x = np.tile([1.0, 2.0, 3.0, 4.0], (3, 1))
    found = front_probability(x, y, x_sign=-1, y_sign=1)
    assert found[0] == 1.0
    assert found[1] > 0.95
    assert np.isnan(found[2:]).all()
    # a single seed's arm still beats others
    beaten = front_probability(
        np.array([[2.0, 1.0], [2.0, nan]]), np.array([[0.5, 0.9], [0.5, nan]]), x_sign=-1, y_sign=1
    )
    assert beaten[0] == 0.0
    assert np.isnan(front_probability(x, np.full((3, 4), nan), x_sign=-1, y_sign=1)).all()


def test_equal_points_stand_together_and_direction_matters() -> None:
    y = np.full((3, 2), 0.5)
    same = front_probability(np.ones((3, 2)), y, x_sign=-1, y_sign=1)
    assert same.tolist() == [1.0, 1.0]
    assert of_two(y).tolist() == [1.0, 0.0]
    dear_is_good = front_probability(np.tile(CHEAP_AND_DEAR, (3, 1)), y, x_sign=1, y_sign=1)
    assert dear_is_good.tolist() == [0.0, 1.0]


def test_of_a_sweep_by_arm_and_cell() -> None:
    rows = [row("a", s, 0.5 + 0.01 * s) for s in (0, 1, 2)] + [row("b", s, 0.9 + 0.01 * s) for s in (0, 1)]
    found = pareto_probabilities(seed_tables(SAVED, rows), SAVED.metric, "cost/state_bytes", "report/accuracy")
    assert found["b", "n_pairs=8"] == 1.0
    assert found["a", "n_pairs=8"] < 0.05  # b has less state and recalls more
    assert found["c", "n_pairs=8"] is None
    assert found["a", "n_pairs=32"] is None
