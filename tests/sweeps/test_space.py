"""Designs of settings are fixed by the sweep file alone."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from sweeps.space import SearchSpace, design


def spaces(**given: dict) -> dict[str, SearchSpace]:
    return {path: SearchSpace.parse(space, path) for path, space in given.items()}


def test_spread_of_one_log_parameter_is_a_grid_with_both_ends():
    found = [point["lr"] for point in design(spaces(lr={"log_uniform": [1e-4, 1e-1]}), 4, "spread")]
    assert found == [1e-4, 1e-3, 1e-2, 1e-1]


def test_spread_of_one_linear_parameter():
    found = [point["wd"] for point in design(spaces(wd={"uniform": [0.0, 0.3]}), 4, "spread")]
    assert found == [0.0, 0.1, 0.2, 0.3]


def test_a_single_trial_sits_in_the_middle():
    assert design(spaces(lr={"log_uniform": [1e-4, 1e-2]}), 1, "spread") == ({"lr": 1e-3},)


def test_spread_of_integers_has_both_ends_and_no_repeats():
    found = [point["k"] for point in design(spaces(k={"int_uniform": [1, 100]}), 5, "spread")]
    assert found == [1, 26, 51, 75, 100]


def test_a_small_discrete_space_is_listed_whole_once():
    given = spaces(k={"int_uniform": [1, 2]}, s={"choice": ["a", "b"]})
    found = design(given, 12, "spread")
    assert found == ({"k": 1, "s": "a"}, {"k": 1, "s": "b"}, {"k": 2, "s": "a"}, {"k": 2, "s": "b"})


def test_spread_of_two_parameters_is_pinned_and_covers_every_quarter():
    found = design(spaces(lr={"log_uniform": [1e-4, 1e-2]}, wd={"uniform": [0.0, 1.0]}), 16, "spread")
    assert len({repr(point) for point in found}) == 16
    quarters = {(math.log10(point["lr"]) > -3, point["wd"] > 0.5) for point in found}
    assert len(quarters) == 4
    counts = np.histogram([point["wd"] for point in found], bins=4, range=(0, 1))[0]
    assert counts.min() >= 3
    assert found[:2] == PINNED_SPREAD


@pytest.mark.parametrize("sampler", ["spread", "random"])
def test_a_design_is_the_same_every_time_and_within_bounds(sampler):
    given = spaces(lr={"log_uniform": [1.23456789e-4, 1e-2]}, k={"int_uniform": [3, 9]})
    found = design(given, 20, sampler)
    assert found == design(given, 20, sampler)
    assert all(1.23456789e-4 <= point["lr"] <= 1e-2 and 3 <= point["k"] <= 9 for point in found)


def test_ends_stay_within_bounds_that_have_many_digits():
    found = [point["lr"] for point in design(spaces(lr={"log_uniform": [1.23456789e-4, 9.87654321e-2]}), 3, "spread")]
    assert found[0] >= 1.23456789e-4
    assert found[-1] <= 9.87654321e-2


PINNED_SPREAD = ({"lr": 0.0030452, "wd": 0.70115}, {"lr": 0.00030452, "wd": 0.0344834})


def test_a_grid_is_the_whole_product():
    spaces = {
        "a": SearchSpace(log_uniform=(1e-3, 1e-1)),
        "b": SearchSpace(choice=("x", "y")),
        "c": SearchSpace(uniform=(0, 1)),
    }
    found = design(spaces, 12, "grid", {"points": {"a": 3}})
    assert len(found) == len({repr(point) for point in found}) == 12
    assert {point["a"] for point in found} == {1e-3, 1e-2, 1e-1}
    assert {point["c"] for point in found} == {0.0, 1.0}


@pytest.mark.parametrize("kind", ["sobol", "halton"])
def test_qmc_covers_every_part_of_every_axis(kind):
    found = design({"a": SearchSpace(uniform=(0, 8)), "b": SearchSpace(uniform=(0, 8))}, 64, "qmc", {"kind": kind})
    for name in "ab":
        counts = Counter(int(min(point[name], 7.999)) for point in found)
        assert len(counts) == 8
        assert min(counts.values()) >= 7
