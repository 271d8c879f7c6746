"""Backward of a chunk's reads and of what it wrote, for everything but the table and the keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk, token_of
from mixers.kernels.launch import launch
from mixers.kernels.read import rows_at_once


@triton.jit(do_not_specialize=["n_table", "n_rows", "n_chunk", "n_tokens", "start", "lookahead"])
def read_backward_kernel(
    later,  # (M*N,V), WRITE only
    before,  # (E,V), or (M*N,V) if not WRITE
    slots,  # (M,R,T,J) int64
    groups,  # (E,) int64, WRITE only
    factors,  # (E,), WRITE only
    weights,  # (M,R,T,J)
    pairs,  # (M,R,T,J) int32
    read,  # (M,R,T,V), WRITE only
    v,  # (M,R,T,V), WRITE only
    pair_weight,  # (M,R,T), WRITE only
    d_out,  # (M,R,T,V)
    d_weights,  # (M,R,T,J), ADD_WEIGHTS only
    temperature,
    d_read,  # out (M,S,V), WRITE only
    d_v,  # out (M,R,T,V), WRITE only
    d_pair_weight,  # out (M,R,T), WRITE only
    d_half,  # out (M,R,T,H,2,k)
    n_table,
    n_rows,
    n_chunk,
    n_tokens,
    start,
    lookahead,
    HEADS: tl.constexpr,
    TOP_K: tl.constexpr,
    VALUE: tl.constexpr,
    WRITE: tl.constexpr,
    ADD_WEIGHTS: tl.constexpr,
    JOINT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ALL_J: tl.constexpr,
):
    query = tl.program_id(0)
    memory = tl.program_id(1)
    token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
    dtype = d_out.dtype.element_ty
    v_index = tl.arange(0, BLOCK_V)
    inside = v_index < VALUE
    first_row = memory.to(tl.int64) * n_table
    first_access = token * (HEADS * TOP_K)
    d_row = tl.load(d_out + token * VALUE + v_index, inside, 0.0)
    error = tl.zeros((BLOCK_V,), dtype=dtype)
    if WRITE:
        writes = query % n_chunk + lookahead < n_chunk
        # Not ``block & writes``: of a block and a scalar some of triton's interpreters make no mask.
        n_written = tl.where(writes, HEADS * TOP_K, 0)
        d_error = tl.zeros((BLOCK_V,), dtype=dtype)
        for first in range(0, HEADS * TOP_K, BLOCK_J):
            j = first + tl.arange(0, BLOCK_J)
            listed = j < n_written
            access = first_access + j
            weight = tl.load(weights + access, listed, 0.0) * tl.load(factors + access, listed, 0.0)
            row = first_row + tl.load(slots + access, listed, 0)
            rows = tl.load(later + row[:, None] * VALUE + v_index[None, :], listed[:, None] & inside[None, :], 0.0)
            d_error += tl.sum(weight[:, None] * rows, axis=0)
        written = v_index < tl.where(writes, VALUE, 0)
        target = tl.load(v + (token + lookahead) * VALUE + v_index, written, 0.0)
        difference = tl.load(read + token * VALUE + v_index, written, 0.0) - target
        weight = tl.load(pair_weight + token)
        error = tl.where(written, weight * difference, 0.0)
        step = tl.where(written, weight * d_error, 0.0)
        d_row += step
        tl.store(d_v + (token + lookahead) * VALUE + v_index, -step, written)
        tl.store(d_pair_weight + token, tl.sum(d_error * difference, axis=0))
        scratch = (memory.to(tl.int64) * n_rows * n_chunk + query) * VALUE
        tl.store(d_read + scratch + v_index, d_row, inside)

    all_j = tl.arange(0, ALL_J)
    on_weights = tl.zeros((ALL_J,), dtype=dtype)
    for first in range(0, HEADS * TOP_K, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        listed = j < HEADS * TOP_K
        access = first_access + j
        row = first_row + tl.load(slots + access, listed, 0)
        if WRITE:
            group = tl.load(groups + access, listed, 0)
        else:
            group = row
        rows = tl.load(before + group[:, None] * VALUE + v_index[None, :], listed[:, None] & inside[None, :], 0.0)
        on_weight = tl.sum(rows * d_row[None, :], axis=1)
        if WRITE:
            moved = j < n_written
            factor = tl.load(factors + access, moved, 0.0)
            rows = tl.load(later + row[:, None] * VALUE + v_index[None, :], moved[:, None] & inside[None, :], 0.0)
            on_weight += factor * tl.sum(rows * error[None, :], axis=1)
        on_weights += tl.sum(tl.where(all_j[:, None] == j[None, :], on_weight[None, :], 0.0), axis=1)

    listed = all_j < HEADS * TOP_K
    weight = tl.load(weights + first_access + all_j, listed, 0.0)
    if ADD_WEIGHTS:
        on_weights += tl.load(d_weights + first_access + all_j, listed, 0.0)
    # Backward of the softmax, then from the pairs to the two halves whose scores they add.
    if JOINT:
        inner = tl.sum(weight * on_weights, axis=0)
    else:
        same_head = (all_j // TOP_K)[:, None] == (all_j // TOP_K)[None, :]
        inner = tl.sum(tl.where(same_head, (weight * on_weights)[None, :], 0.0), axis=1)
    on_scores = weight * (on_weights - inner) / temperature
    pair = tl.load(pairs + first_access + all_j, listed, 0)
    head, place = all_j // TOP_K, all_j % TOP_K
    same_head = (head[:, None] == head[None, :]) & listed[None, :]
    first_half = same_head & (place[:, None] == (pair // TOP_K)[None, :])
    second_half = same_head & (place[:, None] == (pair % TOP_K)[None, :])
    entry = (token * HEADS + head) * 2 * TOP_K + place
    tl.store(d_half + entry, tl.sum(tl.where(first_half, on_scores[None, :], 0.0), axis=1), listed)
    tl.store(d_half + entry + TOP_K, tl.sum(tl.where(second_half, on_scores[None, :], 0.0), axis=1), listed)


def chunk_backward(
    later: Tensor,
    before: Tensor,
    slots: Tensor,
    groups: Tensor,
    factors: Tensor,
    weights: Tensor,
    pairs: Tensor,
    read: Tensor,
    v: Tensor,
    pair_weight: Tensor,
    d_out: Tensor,
    d_weights: Tensor | None,
    temperature: float,
    d_read: Tensor,
    d_v: Tensor,
    d_pair_weight: Tensor,
    d_half: Tensor,
    chunk: Chunk,
    lookahead: int,
    n_heads: int,
) -> None:
    """Derivatives of one chunk's reads and errors.

    With M = ``later`` (M,N,V) the derivative of the table after the chunk, f_tj = ``factors`` (E,), the row's
    -lr scale / cnt, and w_t = ``pair_weight``:

        de_t = sum_j a_tj f_tj M[slot_tj];  dread_t = dout_t + w_t de_t;  dv_{t+L} = -w_t de_t
        dw_t = <de_t, read_t - v_{t+L}>
        da_tj = <f_tj M[slot_tj], w_t (read_t - v_{t+L})> + <dread_t, before[slot_tj]>

    and da carried through the softmax to the half scores, ``d_half`` (M,R,T,H,2,k). ``before`` (E,V) holds the rows
    that the chunk overwrote, at the positions ``groups`` (E,) of the accesses. ``d_read`` (M,S,V) is scratch.

    Bytes per token: J V of ``later`` (once; again from the L1 cache), J V of ``before``, 5 V of the tokens' rows.
    """
    _launch(
        later, before, slots, groups, factors, weights, pairs, read, v, pair_weight, d_out, d_weights, temperature,
        d_read, d_v, d_pair_weight, d_half, chunk, lookahead, n_heads, write=True, joint=True,
    )  # fmt: skip


def weights_backward(
    table: Tensor,
    slots: Tensor,
    weights: Tensor,
    pairs: Tensor,
    d_out: Tensor,
    temperature: float,
    d_half: Tensor,
    chunk: Chunk,
    n_heads: int,
    *,
    joint: bool,
) -> None:
    """Derivative of the half scores (M,R,T,H,2,k) of a read from a table (M,N,V) that nothing writes."""
    nothing = weights
    _launch(
        table, table, slots, slots, nothing, weights, pairs, nothing, nothing, nothing, d_out, None, temperature,
        nothing, nothing, nothing, d_half, chunk, 0, n_heads, write=False, joint=joint,
    )  # fmt: skip


def _launch(
    later, before, slots, groups, factors, weights, pairs, read, v, pair_weight, d_out, d_weights, temperature,
    d_read, d_v, d_pair_weight, d_half, chunk, lookahead, n_heads, *, write, joint,
) -> None:  # fmt: skip
    value_dim, n_read = later.shape[-1], slots.shape[-1]
    block_v = triton.next_power_of_2(value_dim)
    launch(
        read_backward_kernel,
        (chunk.n_queries, chunk.n_memories),
        later,
        before,
        slots,
        groups,
        factors,
        weights,
        pairs,
        read,
        v,
        pair_weight,
        d_out,
        weights if d_weights is None else d_weights,
        temperature,
        d_read,
        d_v,
        d_pair_weight,
        d_half,
        later.shape[1],
        *chunk.sizes,
        lookahead,
        HEADS=n_heads,
        TOP_K=n_read // n_heads,
        VALUE=value_dim,
        WRITE=write,
        ADD_WEIGHTS=d_weights is not None,
        JOINT=joint,
        BLOCK_J=rows_at_once(n_read, block_v),
        BLOCK_V=block_v,
        ALL_J=triton.next_power_of_2(n_read),
        num_warps=4 if block_v >= 256 or n_read > 32 else 2,
    )
