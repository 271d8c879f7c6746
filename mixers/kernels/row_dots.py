"""Inner products of gathered rows with a token's row: the scores of experts that are rows of a table."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.launch import launch
from mixers.kernels.read import rows_at_once


@triton.jit(do_not_specialize=["n_table", "n_queries"])
def row_dots_kernel(
    table,  # (M,N,V)
    slots,  # (M,S,J) int64
    tokens,  # (M,S,V)
    dots,  # out (M,S,J)
    n_table,
    n_queries,
    N_READ: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    v_index = tl.arange(0, BLOCK_V)
    inside = v_index < VALUE
    row = tl.load(tokens + token * VALUE + v_index, inside, 0.0)
    first_row = token // n_queries * n_table
    for first in range(0, N_READ, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        slot = tl.load(slots + token * N_READ + j, j < N_READ, 0)
        rows = tl.load(
            table + (first_row + slot)[:, None] * VALUE + v_index[None, :], (j < N_READ)[:, None] & inside[None, :], 0.0
        )
        tl.store(dots + token * N_READ + j, tl.sum(rows * row[None, :], axis=1), j < N_READ)


def row_dots(table: Tensor, slots: Tensor, tokens: Tensor, dots: Tensor) -> None:
    """dots (M,S,J) = <table[slots_j], tokens_t> for table (M,N,V), slots (M,S,J), tokens (M,S,V).

    Bytes per token: J V table elements and V of the token in, J out.
    """
    value_dim, n_read = table.shape[-1], slots.shape[-1]
    block_v = triton.next_power_of_2(value_dim)
    launch(
        row_dots_kernel,
        (slots.shape[0] * slots.shape[1],),
        *(table, slots, tokens, dots, table.shape[1], slots.shape[1]),
        N_READ=n_read,
        VALUE=value_dim,
        BLOCK_J=rows_at_once(n_read, block_v),
        BLOCK_V=block_v,
        num_warps=4 if block_v >= 512 else 2 if block_v >= 256 else 1,
    )
