from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from analysis.capacity import Capacity, capacities
from analysis.comparison import compare
from analysis.findings_table import threshold_text
from analysis.runs import RunRow
from analysis.stats.thresholds import Crossing, crossing, least_bits, recalled_bits
from tests.analysis.test_comparison import SAVED, row

LOADS = np.array([4.0, 8.0, 16.0, 32.0])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 1.0, 0.8, 0.1], Crossing(3.5, "inside")),  # halfway between 8 and 16, on a log scale
        ([1.0, 0.9, 0.5, 0.1], Crossing(3.0, "inside")),
        ([1.0, 0.8, 1.0, 1.0], Crossing(2.5, "inside")),  # the first fall counts
        ([1.0, 1.0, 1.0, 0.9], Crossing(5.0, "above")),
        ([0.8, 1.0, 1.0, 1.0], Crossing(2.0, "below")),
        ([1.0, 1.0, -math.inf, 0.1], Crossing(3.0, "inside")),  # diverged: not interpolated towards
        ([1.0, 0.5, math.nan, 0.1], Crossing(2.25, "inside")),
    ],
)
def test_where_a_curve_first_falls_below_a_threshold(scores: list[float], expected: Crossing) -> None:
    found = crossing(LOADS, np.array(scores), 0.9)
    if scores[1] == 0.5:
        expected = Crossing(2 + 0.1 / 0.5, "inside")
    assert found == Crossing(pytest.approx(expected.log2), expected.kind)


def test_a_missing_run_before_the_fall_leaves_the_answer_open() -> None:
    assert crossing(LOADS, np.array([1.0, np.nan, 0.5, 0.1]), 0.9).kind == "unknown"


def test_bits_of_known_cases() -> None:
    assert recalled_bits(1.0, 8, 64) == 8 * 6
    assert recalled_bits(1 / 64, 8, 64) == 0
    assert recalled_bits(0.0, 8, 64) < 0
    assert least_bits(1.0, 8, 64) == 8 * 6
    assert least_bits(1 / 64, 8, 64) == pytest.approx(0)
    # a memory that holds 3 of 8 pairs and guesses the others holds 18 bits; Fano's bound is below
    accuracy = 3 / 8 + 5 / 8 / 64
    assert recalled_bits(accuracy, 8, 64) == pytest.approx(18)
    assert 0 < least_bits(accuracy, 8, 64) < 18


def test_fanos_bound_is_the_information_of_the_channel_that_errs_evenly() -> None:
    n_values, error = 16, 0.3
    joint = np.full((n_values, n_values), error / (n_values - 1) / n_values)
    np.fill_diagonal(joint, (1 - error) / n_values)
    information = (joint * np.log2(joint * n_values * n_values)).sum()
    assert least_bits(1 - error, 1, n_values) == pytest.approx(information)


def sweep(curves: dict[tuple[str, int], dict[int, float | None]]) -> tuple[Capacity, ...]:
    """Of accuracies by (arm, seed) and number of pairs; None diverged, left out is missing."""
    loads = sorted({load for curve in curves.values() for load in curve})
    saved = dataclasses.replace(SAVED, cells={f"n_pairs={n}": {"task.n_pairs": n} for n in loads}, seeds=[0, 1, 2])
    rows: list[RunRow] = [
        row(arm, seed, value, pairs=load) for (arm, seed), curve in curves.items() for load, value in curve.items()
    ]
    return capacities(saved, rows, compare(saved, rows))


def test_thresholds_over_seeds_with_intervals_bounds_and_gaps() -> None:
    found = sweep(
        {
            ("a", 0): {4: 1.0, 8: 1.0, 16: 0.8},
            ("a", 1): {4: 1.0, 8: 0.95, 16: 0.85},
            ("a", 2): {4: 1.0, 8: 1.0, 16: None},
            ("b", 0): {4: 0.2, 8: 0.1, 16: 0.1},
            ("b", 1): {4: 0.95, 8: 0.85, 16: 0.1},
            ("c", 0): {4: 1.0, 8: 1.0, 16: 1.0},
            ("c", 1): {4: 1.0, 16: 1.0},
        }
    )
    a, b, c = found
    at_90 = a.thresholds[0]
    assert at_90.pairs == pytest.approx(2 ** ((3.5 + 3.5 + 3.0) / 3))
    assert at_90.low < at_90.pairs < at_90.high
    assert (at_90.n, at_90.n_above, at_90.n_below, at_90.n_unknown) == (3, 0, 0, 0)
    assert [point.n_diverged for point in a.points] == [0, 0, 1]
    assert a.points[0].bits == pytest.approx(4 * 5)  # 64 tokens, 32 of them values
    assert a.points[0].bits_per_byte == pytest.approx(4 * 5 / 100)
    assert b.points[0].bits_per_byte is None  # no state at all
    at_90 = b.thresholds[0]
    assert (at_90.pairs, at_90.low, at_90.n_below, at_90.n_unknown) == (pytest.approx(2**2.25), None, 1, 1)
    assert threshold_text(at_90, b) == "≤ 4.8"
    at_90 = c.thresholds[0]
    assert (at_90.pairs, at_90.n, at_90.n_above, at_90.n_unknown) == (pytest.approx(16), 1, 1, 2)
    assert threshold_text(at_90, c) == "≥ 16"


def test_a_mixture_of_lengths_is_a_curve_of_one_training() -> None:
    def metrics(*values: float) -> dict[str, Any]:
        names = ("accuracy", "accuracy/T64_P4", "accuracy/T128_P8", "accuracy/T256_P16")
        return {f"report/{name}": value for name, value in zip(names, values, strict=True)}

    saved = dataclasses.replace(SAVED, cells={"all": {}}, seeds=[0, 1])
    rows = [
        row("a", seed, 0.5, cell="all", factors={}, metrics=metrics(0.9, 1.0, 1.0, 0.8 - 0.1 * seed)) for seed in (0, 1)
    ]
    (a,) = capacities(saved, rows, compare(saved, rows))
    assert (a.arm, a.group, a.trained) == ("a", "", False)
    assert [point.n_pairs for point in a.points] == [4, 8, 16]
    assert a.thresholds[0].pairs == pytest.approx(2 ** ((3.5 + 3 + 1 / 3) / 2))


def test_other_tasks_and_single_loads_have_none() -> None:
    rows = [row("a", 0, 0.5, settings={"task.name": "text"})]
    assert capacities(SAVED, rows, compare(SAVED, rows)) == ()
    assert sweep({("a", 0): {4: 1.0}}) == ()
