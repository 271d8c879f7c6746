"""Weighted gather of value rows, with the error of what was read."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk, token_of
from mixers.kernels.launch import launch


@triton.jit
def newest_rows(table, row, versions, version, VALUE: tl.constexpr):
    """Where the rows of V stand: row ``version`` of ``versions``, or, where that is -1, ``row`` of ``table``."""
    return tl.where(version >= 0, versions + version.to(tl.int64) * VALUE, table + row * VALUE)


@triton.jit
def weighted_sum(
    first_access, first_row, table, versions, before, slots, weights,
    N_READ: tl.constexpr, VALUE: tl.constexpr, VERSIONS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """sum_j w_j row_j (V,) over a token's J accesses from ``first_access`` on, BLOCK_J rows in flight.

    row_j stands at first_row + slot_j of the table, or with VERSIONS at ``before`` of ``versions``, see
    :func:`newest_rows`.
    """
    v_index = tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_V,), dtype=table.dtype.element_ty)
    for first in range(0, N_READ, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        listed = j < N_READ
        row = first_row + tl.load(slots + first_access + j, listed, 0)
        if VERSIONS:
            place = newest_rows(table, row, versions, tl.load(before + first_access + j, listed, -1), VALUE)
        else:
            place = table + row * VALUE
        weight = tl.load(weights + first_access + j, listed, 0.0)
        rows = tl.load(place[:, None] + v_index[None, :], listed[:, None] & (v_index < VALUE)[None, :], 0.0)
        total += tl.sum(weight[:, None] * rows, axis=0)
    return total


@triton.jit
def pair_weight_of(gate, mask, token, writes, like, GATED: tl.constexpr, MASKED: tl.constexpr):
    """g_t m_t of a token, 0 where it has no target; of the element type of ``like``."""
    weight = writes.to(like.dtype.element_ty)
    if GATED:
        weight = weight * tl.load(gate + token)
    if MASKED:
        weight = weight * tl.load(mask + token).to(weight.dtype)
    return weight


@triton.jit
def read_token(
    query, memory, table, table_step, versions, before, slots, weights, v, gate, mask, out, error, squared_error,
    n_rows, n_chunk, n_tokens, start, lookahead,
    N_READ: tl.constexpr, VALUE: tl.constexpr, VERSIONS: tl.constexpr, GATED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out_t = sum_j w_tj row_tj of one query, and what its pair will write.

    Rows: :func:`weighted_sum`, those of memory m from row m * table_step of the table on. With w_t =
    :func:`pair_weight_of`, error = w_t (read_t - v_{t+L}), zero for the last L tokens of the chunk: (M,R,T,V) with
    VERSIONS, else scratch for one chunk (M,S,V). squared_error (M,R,T): w_t mean_V (read_t - v_{t+L})^2.

    Bytes per token: J V row elements, scattered in rows of V; V of v in, 2 V out.
    """
    token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
    v_index = tl.arange(0, BLOCK_V)
    # Asked for before the rows, which take longest.
    writes = query % n_chunk + lookahead < n_chunk
    # Not ``block & writes``: of a block and a scalar some of triton's interpreters make no mask.
    pair = v_index < tl.where(writes, VALUE, 0)
    target = tl.load(v + (token + lookahead) * VALUE + v_index, pair, 0.0)
    token_weight = pair_weight_of(gate, mask, token, writes, v, GATED, MASKED)
    read = weighted_sum(
        token * N_READ, memory.to(tl.int64) * table_step, table, versions, before, slots, weights,
        N_READ, VALUE, VERSIONS, BLOCK_J, BLOCK_V,
    )  # fmt: skip
    tl.store(out + token * VALUE + v_index, read, v_index < VALUE)
    difference = tl.where(pair, read - target, 0.0)
    error_row = token
    if not VERSIONS:
        error_row = memory.to(tl.int64) * n_rows * n_chunk + query
    tl.store(error + error_row * VALUE + v_index, token_weight * difference, v_index < VALUE)
    tl.store(squared_error + token, token_weight * (tl.sum(difference * difference, axis=0) / VALUE))


@triton.jit(do_not_specialize=["n_table", "n_rows", "n_chunk", "n_tokens", "start"])
def read_kernel(
    table,  # (M,N,V)
    slots,  # (M,R,T,J) int64
    weights,  # (M,R,T,J)
    out,  # out (M,R,T,V)
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
    read = weighted_sum(
        token * N_READ, memory.to(tl.int64) * n_table, table, table, slots, slots, weights,
        N_READ, VALUE, False, BLOCK_J, BLOCK_V,
    )  # fmt: skip
    v_index = tl.arange(0, BLOCK_V)
    tl.store(out + token * VALUE + v_index, read, v_index < VALUE)


def read_rows(table: Tensor, slots: Tensor, weights: Tensor, out: Tensor, chunk: Chunk) -> None:
    """out (M,R,T,V) = sum_j weights_j table[slots_j] for table (M,N,V), slots and weights (M,R,T,J).

    Bytes per token: J V table elements in, V out, 12 J of slots and weights.
    """
    value_dim, n_read = table.shape[-1], slots.shape[-1]
    block_v = triton.next_power_of_2(value_dim)
    launch(
        read_kernel,
        (chunk.n_queries, chunk.n_memories),
        *(table, slots, weights, out, table.shape[1], *chunk.sizes),
        N_READ=n_read,
        VALUE=value_dim,
        BLOCK_J=rows_at_once(n_read, block_v),
        BLOCK_V=block_v,
        num_warps=4 if block_v >= 512 else 2 if block_v >= 256 else 1,
    )


def rows_at_once(n_read: int, block_v: int) -> int:
    """How many rows a program keeps in flight: at most 4096 elements, 32 to a thread of four warps."""
    return max(1, min(triton.next_power_of_2(n_read), 4096 // block_v))
