"""Weighted gather of value rows, with the error of what was read."""

from __future__ import annotations

import triton
import triton.language as tl

from mixers.kernels.chunk import token_of


@triton.jit
def read_token(
    query, memory, table, slots, weights, v, pair_weight, out, error, squared_error,
    n_table, n_rows, n_chunk, n_tokens, start, lookahead,
    N_READ: tl.constexpr, VALUE: tl.constexpr, WRITE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out_t = sum_j w_tj table[slot_tj] of one query; with WRITE also what its pair will write.

    error (M,S,V), scratch for one chunk: pair_weight_t (read_t - v_{t+L}), zero for the last L tokens of the chunk.
    squared_error (M,R,T): pair_weight_t mean_V (read_t - v_{t+L})^2.

    Bytes per token: J V table elements, scattered in rows of V; V out; with WRITE V of v in and V of errors out.
    """
    token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
    v_index = tl.arange(0, BLOCK_V)
    inside = v_index < VALUE
    first_row = memory.to(tl.int64) * n_table
    if WRITE:
        # Asked for before the rows, which take longest.
        writes = query % n_chunk + lookahead < n_chunk
        # Not ``inside & writes``: of a block and a scalar some of triton's interpreters make no mask.
        pair = v_index < tl.where(writes, VALUE, 0)
        target = tl.load(v + (token + lookahead) * VALUE + v_index, pair, 0.0)
        token_weight = tl.load(pair_weight + token)
    read = tl.zeros((BLOCK_V,), dtype=table.dtype.element_ty)
    for first in range(0, N_READ, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        slot = tl.load(slots + token * N_READ + j, j < N_READ, 0)
        weight = tl.load(weights + token * N_READ + j, j < N_READ, 0.0)
        rows = tl.load(
            table + (first_row + slot)[:, None] * VALUE + v_index[None, :], (j < N_READ)[:, None] & inside[None, :], 0.0
        )
        read += tl.sum(weight[:, None] * rows, axis=0)
    tl.store(out + token * VALUE + v_index, read, inside)
    if WRITE:
        difference = tl.where(pair, read - target, 0.0)
        scratch = (memory.to(tl.int64) * n_rows * n_chunk + query) * VALUE
        tl.store(error + scratch + v_index, token_weight * difference, inside)
        tl.store(squared_error + token, token_weight * (tl.sum(difference * difference, axis=0) / VALUE))


def rows_at_once(n_read: int, block_v: int) -> int:
    """How many rows a program keeps in flight: at most 4096 elements, 32 to a thread of four warps."""
    return max(1, min(triton.next_power_of_2(n_read), 4096 // block_v))
