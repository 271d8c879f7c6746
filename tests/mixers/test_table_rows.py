"""Sums and inner products of a table's rows: each implementation against gathered rows in float64, with gradients."""

from __future__ import annotations

import pytest
import torch

from mixers import registry, table_rows
from mixers.errors import UserError
from tests.mixers.interpreter import interpreted

INTERPRETED = """
import torch
from mixers.kernels import row_gradients, row_sums
from tests.mixers.test_table_rows import SIZES, require_equal
# Rows cut into slices, and lists of accesses into pieces, at these sizes.
row_gradients.LONG = row_sums.NARROWEST = 4
for sizes in SIZES:
    require_equal("triton", *sizes)
row_gradients.LONG = 256
require_equal("triton", *SIZES[0])
print("equal")
"""
# (N,V,S,J)
SIZES = [(50, 33, 21, 5), (1, 3, 9, 2), (7, 1, 4, 1), (200, 16, 3, 7), (9, 5, 0, 3), (2, 5, 0, 3)]


def require_equal(impl: str, n_slots: int, width: int, n_tokens: int, n_read: int) -> None:
    """Outputs and gradients of both operations; every token reads slot 0."""
    torch.manual_seed(n_slots + width)
    slots = torch.randint(0, n_slots, (n_tokens, n_read))
    slots[:, 0] = 0
    shapes = ((n_slots, width), (n_tokens, n_read), (n_tokens, width))
    table, weights, x = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    found = table_rows.sum_rows(table, slots, weights, impl), table_rows.dot_rows(table, slots, x, impl)
    rows = table[slots]
    wanted = (rows * weights[..., None]).sum(1), (rows * x[:, None]).sum(-1)
    for got, want, other in zip(found, wanted, (weights, x), strict=True):
        noise = torch.randn_like(want)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
        gradients = (torch.autograd.grad((y * noise).sum(), [table, other], retain_graph=True) for y in (got, want))
        for one, two in zip(*gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


@pytest.mark.parametrize("impl", ["reference", "sparse"])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_gathered_rows(impl, sizes):
    require_equal(impl, *sizes)


def test_triton_equals_gathered_rows_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    done = interpreted("-c", INTERPRETED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["equal"]


@pytest.mark.parametrize("name", ["pkm", "peer"])
def test_triton_on_the_cpu_is_one_clear_error_and_auto_is_sparse(name):
    options = {"d_model": 6, "n_subkeys": 4, "top_k": 2}
    assert registry.build(name, options).impl == "sparse"
    layer = registry.build(name, {**options, "impl": "triton"})
    with pytest.raises(UserError, match=f"{name}: impl='triton' (needs the package triton|runs on cuda only)"):
        layer(torch.randn(1, 3, 6))


def test_sparse_reads_are_deterministic():
    slots, weights = torch.randint(0, 5, (300, 7)), torch.randn(300, 7)
    table, noise = torch.randn(5, 9, requires_grad=True), torch.randn(300, 9)
    first, second = (
        torch.autograd.grad((table_rows.sum_rows(table, slots, weights, "sparse") * noise).sum(), table)[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)
