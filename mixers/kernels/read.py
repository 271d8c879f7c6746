"""Weighted gather of value rows, with the error of what was read."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import token_of


@triton.jit
def newest_rows(table, row, versions, version, VALUE: tl.constexpr, ALIGN: tl.constexpr):
    """Where the rows of V stand: row ``version`` of ``versions``, or, where that is -1, ``row`` of ``table``.

    ALIGN is from :func:`row_alignment`: the compiler doesn't see through the choice and would load single elements.
    """
    place = tl.where(version >= 0, versions + version.to(tl.int64) * VALUE, table + row * VALUE)
    return tl.multiple_of(place, ALIGN)


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
    ALIGN: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out_t = sum_j a_tj row_tj of one query, BLOCK_J rows in flight, and what its pair will write.

    row_tj is row m * table_step + slot_tj of the table; with VERSIONS row ``before`` of ``versions`` where that is not
    -1. With w_t = :func:`pair_weight_of`, error = w_t (read_t - v_{t+L}), zero for the last L tokens of the chunk:
    (M,R,T,V) with VERSIONS, else scratch for one chunk (M,S,V). squared_error (M,R,T): w_t mean_V (read_t - v_{t+L})^2.

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
    first_row = memory.to(tl.int64) * table_step
    read = tl.zeros((BLOCK_V,), dtype=table.dtype.element_ty)
    for first in range(0, N_READ, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        listed = j < N_READ
        row = first_row + tl.load(slots + token * N_READ + j, listed, 0)
        if VERSIONS:
            place = newest_rows(table, row, versions, tl.load(before + token * N_READ + j, listed, -1), VALUE, ALIGN)
        else:
            place = table + row * VALUE
        weight = tl.load(weights + token * N_READ + j, listed, 0.0)
        rows = tl.load(place[:, None] + v_index[None, :], listed[:, None] & (v_index < VALUE)[None, :], 0.0)
        read += tl.sum(weight[:, None] * rows, axis=0)
    tl.store(out + token * VALUE + v_index, read, v_index < VALUE)
    difference = tl.where(pair, read - target, 0.0)
    error_row = token
    if not VERSIONS:
        error_row = memory.to(tl.int64) * n_rows * n_chunk + query
    tl.store(error + error_row * VALUE + v_index, token_weight * difference, v_index < VALUE)
    tl.store(squared_error + token, token_weight * (tl.sum(difference * difference, axis=0) / VALUE))


def row_alignment(*tables: Tensor) -> int:
    """The bytes, at most 16, by which all rows of the tables (...,V) are aligned."""
    return math.gcd(16, *(table.shape[-1] * table.element_size() for table in tables), *(t.data_ptr() for t in tables))


def rows_at_once(n_read: int, block_v: int) -> int:
    """How many rows a program keeps in flight: at most 4096 elements, 32 to a thread of four warps."""
    return max(1, min(triton.next_power_of_2(n_read), 4096 // block_v))
