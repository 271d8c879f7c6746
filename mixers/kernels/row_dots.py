"""Inner products of gathered rows with a token's row: the derivative of a read with respect to its weights."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk, token_of
from mixers.kernels.launch import launch
from mixers.kernels.read import rows_at_once


@triton.jit(do_not_specialize=["n_table", "n_rows", "n_chunk", "n_tokens", "start"])
def row_dots_kernel(
    table,  # (M,N,V)
    slots,  # (M,R,T,J) int64
    tokens,  # (M,R,T,V)
    dots,  # out (M,R,T,J)
    n_table,
    n_rows,
    n_chunk,
    n_tokens,
    start,
    N_READ: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    memory = tl.program_id(1)
    token = token_of(tl.program_id(0), memory, n_rows, n_chunk, n_tokens, start)
    v_index = tl.arange(0, BLOCK_V)
    inside = v_index < VALUE
    row = tl.load(tokens + token * VALUE + v_index, inside, 0.0)
    first_row = memory.to(tl.int64) * n_table
    for first in range(0, N_READ, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        slot = tl.load(slots + token * N_READ + j, j < N_READ, 0)
        rows = tl.load(
            table + (first_row + slot)[:, None] * VALUE + v_index[None, :], (j < N_READ)[:, None] & inside[None, :], 0.0
        )
        tl.store(dots + token * N_READ + j, tl.sum(rows * row[None, :], axis=1), j < N_READ)


def row_dots(table: Tensor, slots: Tensor, tokens: Tensor, dots: Tensor, chunk: Chunk) -> None:
    """dots (M,R,T,J) = <table[slots_j], tokens_t> for table (M,N,V), slots (M,R,T,J), tokens (M,R,T,V).

    Bytes per token: J V table elements and V of the token in, J out.
    """
    value_dim, n_read = table.shape[-1], slots.shape[-1]
    block_v = triton.next_power_of_2(value_dim)
    launch(
        row_dots_kernel,
        (chunk.n_queries, chunk.n_memories),
        table,
        slots,
        tokens,
        dots,
        table.shape[1],
        *chunk.sizes,
        N_READ=n_read,
        VALUE=value_dim,
        BLOCK_J=rows_at_once(n_read, block_v),
        BLOCK_V=block_v,
        num_warps=4 if block_v >= 512 else 2 if block_v >= 256 else 1,
    )
