"""Comparisons of the suite: NaN never passes, and positions are named."""

from __future__ import annotations

import pytest
import torch

from mixers.contract.errors import ContractError
from mixers.contract.subject import difference, place, require_finite, require_same, require_same_state

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("found", "expected"), [([NAN], [NAN]), ([NAN], [0.0]), ([0.0], [NAN]), ([INF], [INF]), ([INF], [0.0])]
)
def test_nan_and_infinity_never_pass(found, expected):
    with pytest.raises(ContractError, match="output, differs by inf"):
        require_same(torch.tensor(found), torch.tensor(expected), "output")


def test_the_largest_difference_is_found():
    x = torch.zeros(2, 3, 4)
    y = x.clone()
    y[1, 0, 2], y[0, 2, 3] = 0.5, -2.0
    assert difference(x, y) == (2.0, (0, 2, 3))
    assert place((0, 2, 3)) == "sequence 0, token 2, channel 3"
    assert difference(x[:0], y[:0]) == (0.0, ())


def test_the_limit_is_relative_to_large_values_only():
    require_same(torch.tensor([1000.0 + 5e-7]).double(), torch.tensor([1000.0]).double(), "output")
    with pytest.raises(ContractError):
        require_same(torch.tensor([5e-9]).double(), torch.tensor([0.0]).double(), "output")


def test_shape_dtype_and_structure_are_compared():
    with pytest.raises(ContractError, match=r"shape \(2, 1\) instead of \(2,\)"):
        require_same(torch.zeros(2, 1), torch.zeros(2), "output")
    with pytest.raises(ContractError, match=r"float64 instead of torch\.float32"):
        require_same(torch.zeros(2).double(), torch.zeros(2), "output")
    with pytest.raises(ContractError, match="1 tensors instead of 2"):
        require_same_state((torch.zeros(2), None), (torch.zeros(2), torch.zeros(0)), "state")
    with pytest.raises(ContractError, match=r"2 values aren't finite \(index \(1,\)\)"):
        require_finite(torch.tensor([0.0, INF, NAN]), "y")
