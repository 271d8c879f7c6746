from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from analysis.paired import MOST_COMPARISONS, paired_differences
from analysis.runs import RunRow
from analysis.seeds import seed_tables
from analysis.stats.paired import holm, paired_t
from sweeps.saved import SavedSweep
from tests.analysis.test_comparison import SAVED, row


def of(saved: SavedSweep, rows: list[RunRow], **options: Any) -> dict[tuple[str, str, str], Any]:
    found = paired_differences(seed_tables(saved, rows), "report/accuracy", **options)
    return {(each.cell, each.a, each.b): each for each in found}


def test_paired_t_agrees_with_scipy_and_leaves_seeds_without_a_pair_out() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 4, 7))
    a[0, 2] = b[1, 5] = b[1, 6] = np.nan
    test = paired_t(a - b)
    for i in range(4):
        both = np.isfinite(a[i] - b[i])
        expected = scipy.stats.ttest_rel(a[i][both], b[i][both])
        low, high = expected.confidence_interval(0.95)
        assert (test.n[i], test.p[i], test.low[i], test.high[i]) == pytest.approx(
            (both.sum(), expected.pvalue, low, high)
        )


def test_what_has_no_spread_has_no_p() -> None:
    test = paired_t(np.array([[0.0, 0.0, 0.0], [0.3, 0.3, 0.3], [0.1, np.nan, np.nan], [np.nan] * 3]))
    assert test.n.tolist() == [3, 3, 1, 0]
    assert test.p[0] == 1.0
    assert np.isnan(test.p[1:]).all()
    assert test.mean[:3].tolist() == pytest.approx([0.0, 0.3, 0.1])
    assert np.isnan(test.low[2:]).all()


def test_holm_is_that_of_its_paper() -> None:
    p = np.array([0.01, 0.04, 0.03, np.nan, 0.005])
    assert holm(p).tolist() == pytest.approx([0.04, 0.09, 0.09, math.nan, 0.025], nan_ok=True)
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]
    assert holm(np.array([])).tolist() == []


@pytest.mark.parametrize("n", [3, 5])
def test_equal_arms_are_told_apart_no_more_often_than_promised(n: int) -> None:
    """Six arms that are the same, all 15 pairs, correlated through the seeds and through the shared arms."""
    n_trials = 4000
    rng = np.random.default_rng(n)
    values = 0.8 + rng.normal(0, 0.05, (n_trials, 1, n)) + rng.normal(0, 0.02, (n_trials, 6, n))
    first, second = np.triu_indices(6, 1)
    p = paired_t(values[:, first] - values[:, second]).p
    single = (p < 0.05).mean()
    assert abs(single - 0.05) < 0.01
    families = np.array([holm(of_trial).min() for of_trial in p])
    uncorrected = (p.min(1) < 0.05).mean()
    assert (families < 0.05).mean() < 0.05 + 4 * math.sqrt(0.05 * 0.95 / n_trials)
    assert uncorrected > 0.3
    # and a real difference, five times the noise of a pair, is found
    values[:, 0] += 5 * 0.02 * math.sqrt(2)
    assert (paired_t(values[:, 0] - values[:, 1]).p < 0.05).mean() > 0.8


def test_pairing_takes_out_what_seeds_share() -> None:
    shared = {0: 0.1, 1: 0.5, 2: 0.9}
    rows = [row("a", s, v, data_hash=f"d{s}") for s, v in shared.items()]
    rows += [row("b", s, v + 0.05 + 0.001 * s, data_hash=f"d{s}") for s, v in shared.items()]
    found = of(SAVED, rows)["n_pairs=8", "b", "a"]
    assert (found.n, found.n_unfinished, found.n_other_data) == (3, 0, 0)
    assert found.mean == pytest.approx(0.051)
    assert found.p < 1e-3
    assert found.p_holm == pytest.approx(6 * found.p)  # three pairs of arms in two cells


def test_only_seeds_on_the_same_known_data_are_paired() -> None:
    rows = [row("a", 0, 0.5, data_hash="x"), row("a", 1, 0.5, data_hash="y"), row("a", 2, 0.5, data_hash="z")]
    rows += [row("b", 0, 0.6, data_hash="x"), row("b", 1, 0.6, data_hash="other"), row("b", 2, data_hash="z")]
    rows += [row("c", 0, 0.6), row("c", 1, 0.6)]
    found = of(SAVED, rows)
    one = found["n_pairs=8", "b", "a"]
    assert (one.n, one.n_unfinished, one.n_other_data) == (1, 1, 1)
    assert (one.mean, one.low, one.p) == (pytest.approx(0.1), None, None)
    unknown = found["n_pairs=8", "c", "a"]
    assert (unknown.n, unknown.n_unfinished, unknown.n_other_data, unknown.mean) == (0, 1, 2, None)
    assert found["n_pairs=32", "b", "a"].n_unfinished == 3


def test_a_baseline_makes_the_family_smaller_and_too_many_pairs_get_one() -> None:
    rows = [row(arm, s, 0.5 + s / 10, data_hash="x") for arm in "abc" for s in (0, 1)]
    assert set(of(SAVED, rows, baseline="b")) == {
        (cell, arm, "b") for cell in ("n_pairs=8", "n_pairs=32") for arm in ("a", "c")
    }
    many = dataclasses.replace(SAVED, arms={f"arm {i}": "softmax" for i in range(80)})
    found = of(many, [])
    assert len(found) == 2 * 79 <= MOST_COMPARISONS
    assert {b for _, _, b in found} == {"arm 0"}
