"""Weighted sums of a table's rows, one for each token: the read of a static product-key memory."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.launch import launch


@triton.jit(do_not_specialize=["n_table", "n_queries"])
def row_sums_kernel(
    table,  # (M,N,V)
    slots,  # (M,S,J) int64
    weights,  # (M,S,J)
    out,  # out (M,S,V)
    n_table,
    n_queries,
    N_READ: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    v_index = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = v_index < VALUE
    first_row = token // n_queries * n_table
    total = tl.zeros((BLOCK_V,), dtype=table.dtype.element_ty)
    for first in range(0, N_READ, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        slot = tl.load(slots + token * N_READ + j, j < N_READ, 0)
        weight = tl.load(weights + token * N_READ + j, j < N_READ, 0.0)
        rows = tl.load(
            table + (first_row + slot)[:, None] * VALUE + v_index[None, :], (j < N_READ)[:, None] & inside[None, :], 0.0
        )
        total += tl.sum(weight[:, None] * rows, axis=0)
    tl.store(out + token * VALUE + v_index, total, inside)


def row_sums(table: Tensor, slots: Tensor, weights: Tensor, out: Tensor) -> None:
    """out (M,S,V) = sum_j weights_j table[slots_j] for table (M,N,V), slots and weights (M,S,J).

    Where tokens read most rows several times, all tokens first read one slice of the rows' elements, which the L2 cache
    holds of the whole table, then the next. Bytes: the rows that are read, once, or J V elements a token where a slice
    would be too narrow; V out; 12 J of slots and weights for each slice.
    """
    value_dim, n_read = table.shape[-1], slots.shape[-1]
    n_accesses, n_table = slots.numel(), table.shape[0] * table.shape[1]
    width = triton.next_power_of_2(value_dim)
    if n_accesses >= 2 * n_table:
        width = slice_width(n_table * table.element_size(), value_dim, _cache_bytes(table.device))
    launch(
        row_sums_kernel,
        (slots.shape[0] * slots.shape[1], triton.cdiv(value_dim, width)),
        *(table, slots, weights, out, table.shape[1], slots.shape[1]),
        N_READ=n_read,
        VALUE=value_dim,
        BLOCK_J=max(1, min(triton.next_power_of_2(n_read), ELEMENTS // width)),
        BLOCK_V=width,
        num_warps=max(1, min(4, width // 128)),
    )


# Elements that a program has in flight; elements of a slice at least, 128 bytes of float32.
ELEMENTS, NARROWEST = 2048, 32


def slice_width(column_bytes: int, value_dim: int, cache_bytes: int) -> int:
    """How many elements of each row to read at a time: a power of 2, as many as one and a half times the cache holds of
    all rows; where that is fewer than ``NARROWEST``, whole rows, which then are read anew by every access."""
    whole = triton.next_power_of_2(value_dim)
    fits = 3 * cache_bytes // (2 * column_bytes)
    if fits >= whole or fits < NARROWEST:
        return whole
    return 1 << fits.bit_length() - 1


@cache
def _cache_bytes(device: torch.device) -> int:
    # Interpreted there is no cache: few bytes, so that tests cut rows.
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 4096
