"""Sparse reads of a trained table, differentiable, with backward passes written out: sums and inner products of rows.

Neither direction forms the (S,J,V) rows of all accesses. The derivative of the table is dense, as optimisers want it:
every row is written once, as the sum over its accesses in the order of the tokens, so equal inputs give equal bits.

Letters: N rows of a table, V width of a row, S tokens, J accesses per token.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixers import product_keys
from mixers.errors import UserError
from mixers.fwpkm.sparse_rows import gather_dot, gather_sum, group_accesses, segment_sum, stable_sort

Impl = Literal["auto", "reference", "sparse", "triton"]
TRITON_DTYPES = (torch.float32, torch.float64)
MAX_TRITON_WIDTH = 4096
TRITON_MISSING = importlib.util.find_spec("triton") is None


def resolve(requested: Impl, table: Tensor, place: str) -> str:
    """``reference``, ``sparse`` or ``triton`` for reads of ``table`` (N,V), where it stands.

    ``auto`` takes ``triton`` on CUDA where it is installed and has kernels for the table, else ``sparse``. Time of
    ``reference`` over that of ``sparse``, forward and backward (float32, one thread of a Xeon that others used too,
    smallest CPU time of 5 interleaved repeats; S = 4096, but 1024 for the sizes marked *):

        n    J    V    sum_rows   dot_rows
        10   4    40   1.36       3.8
        10   4    64   1.22       5.5
        32   32   64   1.61       7.1
        32   32   512  1.50       15.8
        32   128  64   1.34       6.2
        32   128  512  1.29       22*
        128  32   64   1.27       5.1
        128  32   512  1.12       8.3
        128  128  64   1.28       5.1
        128  128  512  1.16       8.1*
        512  32   64   1.01       2.1
        512  32   512  1.04       2.4
        512  128  64   1.05       3.0
        512  128  512  1.08       2.7*

    (N = n*n, * of dot_rows only.) Forward alone, sum_rows is the same operation, dot_rows 2 to 25 times as fast.
    Reads of a few tokens cost the derivative of the whole table, in both alike. GPUs were not measured.

    Raises:
        UserError: triton is asked for and is missing, or has no kernels for the table.
    """
    if requested == "auto":
        return "triton" if table.device.type == "cuda" and not _why_not_triton(table) else "sparse"
    if requested == "triton":
        why = _why_not_triton(table)
        if why:
            raise UserError(f"{place}: impl='triton' {why}; use impl='auto' or 'sparse'")
    return requested


def _why_not_triton(table: Tensor) -> str:
    if TRITON_MISSING:
        return "needs the package triton, not installed here (pip install triton)"
    if table.device.type != "cuda":
        return f"runs on cuda only and the table is on {table.device.type}"
    if table.dtype not in TRITON_DTYPES:
        return f"has kernels for float32 and float64, not {str(table.dtype).removeprefix('torch.')}"
    if table.shape[-1] > MAX_TRITON_WIDTH:
        return f"has kernels for widths up to {MAX_TRITON_WIDTH}, not {table.shape[-1]}"
    return ""


def sum_rows(table: Tensor, slots: Tensor, weights: Tensor, impl: str) -> Tensor:
    """sum_j weights_j * table[slot_j]: table (N,V), slots int64 and weights (S,J) -> (S,V)."""
    if impl == "triton":
        from mixers.kernels.weighted_rows import weighted_rows

        return weighted_rows(table[None], slots[None], weights[None])[0]
    if impl == "sparse":
        return _SumRows.apply(table, slots, weights)
    return product_keys.read(table[None], slots[None], weights[None])[0]


def dot_rows(table: Tensor, slots: Tensor, x: Tensor, impl: str) -> Tensor:
    """<table[slot_j], x>: table (N,V), slots int64 (S,J), x (S,V) -> (S,J). ``reference`` forms the rows (S,J,V)."""
    if impl == "triton":
        from mixers.kernels.weighted_rows import dotted_rows

        return dotted_rows(table[None], slots[None], x[None])[0]
    if impl == "sparse":
        return _DotRows.apply(table, slots, x)
    return product_keys.dot_rows(table[None], slots[None], x[None])[0]


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, slots, weights):
        ctx.save_for_backward(table, slots, weights)
        return gather_sum(table, slots, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        table, slots, weights = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_table = _scatter(d_out, weights, slots, table.shape[0]) if ctx.needs_input_grad[0] else None
        d_weights = gather_dot(table, slots, d_out) if ctx.needs_input_grad[2] else None
        return d_table, None, d_weights


class _DotRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, slots, x):
        x = x.contiguous()
        ctx.save_for_backward(table, slots, x)
        return gather_dot(table, slots, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_dots):
        table, slots, x = ctx.saved_tensors
        d_dots = d_dots.contiguous()
        d_table = _scatter(x, d_dots, slots, table.shape[0]) if ctx.needs_input_grad[0] else None
        d_x = gather_sum(table, slots, d_dots) if ctx.needs_input_grad[2] else None
        return d_table, None, d_x


def _scatter(tokens: Tensor, weights: Tensor, slots: Tensor, n_slots: int) -> Tensor:
    """Row n: the sum of weights[s,j] * tokens[s] over accesses slots[s,j] = n: (N,V).

    All rows are written in one pass; where most of them are zero for want of accesses, the others after a fill.
    """
    if not slots.numel():
        return tokens.new_zeros(n_slots, tokens.shape[1])
    if slots.numel() < n_slots // 4:
        accesses = group_accesses(slots)
        rows = segment_sum(tokens, weights, accesses.order, accesses.starts)
        return tokens.new_zeros(n_slots, tokens.shape[1]).index_copy_(0, accesses.rows, rows)
    in_order, order = stable_sort(slots.flatten())
    starts = torch.searchsorted(in_order, torch.arange(n_slots, device=slots.device))
    return segment_sum(tokens, weights, order, starts)
