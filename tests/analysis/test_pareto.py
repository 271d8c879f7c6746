from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.pareto import pareto


def test_lower_cost_and_higher_quality_are_better() -> None:
    points = [(1, 0.5), (2, 0.9), (3, 0.8), (4, 0.95), (1, 0.4)]
    assert pareto(points, x_sign=-1, y_sign=1) == [True, True, False, True, False]


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        ((-1, 1), [False, True, False, False]),
        ((1, 1), [False, False, True, True]),
        ((-1, -1), [True, True, False, False]),
        ((1, -1), [True, False, False, True]),
    ],
)
def test_each_axis_has_its_own_direction(signs: tuple[int, int], expected: list[bool]) -> None:
    points = [(2, 1), (1, 5), (2, 5), (4, 3)]
    assert pareto(points, x_sign=signs[0], y_sign=signs[1]) == expected


def test_equal_points_stand_together_and_a_tie_on_one_axis_is_decided_by_the_other() -> None:
    assert pareto([(1, 1), (1, 1)], x_sign=-1, y_sign=1) == [True, True]
    assert pareto([(1, 1), (1, 2), (0.5, 1)], x_sign=-1, y_sign=1) == [False, True, True]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_a_point_without_a_number_is_never_on_the_front_and_dominates_nothing(bad: float | None) -> None:
    assert pareto([(bad, 1.0), (1.0, 0.5)], x_sign=-1, y_sign=1) == [False, True]
    assert pareto([(0.0, bad), (1.0, 0.5)], x_sign=-1, y_sign=1) == [False, True]
    assert pareto([(bad, bad)], x_sign=1, y_sign=1) == [False]


def test_sweeping_along_the_cost_finds_the_same_front() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        points = [(float(x), float(y)) for x, y in rng.integers(0, 8, (12, 2))]
        best_at_lower_cost = {x: max((y for at, y in points if at < x), default=-1.0) for x, _ in points}
        best_at_cost = {x: max(y for at, y in points if at == x) for x, _ in points}
        expected = [y == best_at_cost[x] and y > best_at_lower_cost[x] for x, y in points]
        assert pareto(points, x_sign=-1, y_sign=1) == expected
