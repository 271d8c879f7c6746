"""Backward of a token's read and of what it wrote, for everything but the table and the keys."""

from __future__ import annotations

import triton
import triton.language as tl

from mixers.kernels.chunk import token_of
from mixers.kernels.read import newest_rows, pair_weight_of


@triton.jit
def later_rows(
    access, row, listed, later, d_table, after, v_index,
    VALUE: tl.constexpr, GIVEN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The derivatives M of rows after the chunk, see :func:`mixers.kernels.row_steps.step_rows_backward`."""
    version = tl.load(after + access, listed, -1)
    place = later + version.to(tl.int64) * VALUE
    if GIVEN:
        place = newest_rows(d_table, row, later, version, VALUE, ALIGN)
    else:
        listed = listed & (version >= 0)
    return tl.load(place[:, None] + v_index[None, :], listed[:, None] & (v_index < VALUE)[None, :], 0.0)


@triton.jit
def read_again(
    access, row, listed, table, versions, before, v_index,
    VALUE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The rows that the accesses read."""
    place = newest_rows(table, row, versions, tl.load(before + access, listed, -1), VALUE, ALIGN)
    return tl.load(place[:, None] + v_index[None, :], listed[:, None] & (v_index < VALUE)[None, :], 0.0)


@triton.jit
def token_backward(
    query, memory, later, d_table, table, table_step, versions, before, after, slots, factors, weights, pairs,
    read, v, gate, mask, d_out, d_weights, temperature, d_read, d_v, d_gate, d_half,
    n_table, n_rows, n_chunk, n_tokens, start, lookahead,
    HEADS: tl.constexpr, TOP_K: tl.constexpr, VALUE: tl.constexpr, GATED: tl.constexpr, MASKED: tl.constexpr,
    ADD_WEIGHTS: tl.constexpr, GIVEN: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_V: tl.constexpr, ALL_J: tl.constexpr,
):  # fmt: skip
    """Derivatives of one token's read and error.

    With M the derivative of the rows after the chunk, f_tj = ``factors`` (E,), the row's -lr scale / cnt, and
    w_t = gate_t mask_t:

        de_t = sum_j a_tj f_tj M[slot_tj];  dread_t = dout_t + w_t de_t;  dv_{t+L} = -w_t de_t
        dgate_t = mask_t <de_t, read_t - v_{t+L}>
        da_tj = <f_tj M[slot_tj], w_t (read_t - v_{t+L})> + <dread_t, row_tj>

    and da carried through the softmax to the half scores, ``d_half`` (M,R,T,H,2,k). M stands in ``later`` (E,V) and
    ``d_table`` (M*N,V), :func:`later_rows`; row_tj, the rows that were read, in ``versions`` (E,V) and the table.
    ``d_read`` (M,S,V) is scratch.

    Bytes per token: V of M for every access whose row is read again, J V of the rows, 5 V of the tokens' rows.
    """
    token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
    dtype = d_out.dtype.element_ty
    v_index = tl.arange(0, BLOCK_V)
    inside = v_index < VALUE
    all_j = tl.arange(0, ALL_J)
    first_access = token * (HEADS * TOP_K)
    table_row = memory.to(tl.int64) * table_step
    d_row_first = memory.to(tl.int64) * n_table
    writes = query % n_chunk + lookahead < n_chunk
    # Not ``block & writes``: of a block and a scalar some of triton's interpreters make no mask.
    written = v_index < tl.where(writes, VALUE, 0)
    n_written = tl.where(writes, HEADS * TOP_K, 0)
    target = tl.load(v + (token + lookahead) * VALUE + v_index, written, 0.0)
    difference = tl.load(read + token * VALUE + v_index, written, 0.0) - target
    token_weight = pair_weight_of(gate, mask, token, writes, d_out, GATED, MASKED)
    d_row = tl.load(d_out + token * VALUE + v_index, inside, 0.0)
    error = tl.where(written, token_weight * difference, 0.0)
    if HEADS * TOP_K <= BLOCK_J:
        # Asked for before the others, on which what they are multiplied by depends.
        j = tl.arange(0, BLOCK_J)
        listed = j < HEADS * TOP_K
        slot = tl.load(slots + first_access + j, listed, 0)
        all_rows = read_again(
            first_access + j, table_row + slot, listed, table, versions, before, v_index, VALUE, ALIGN
        )  # fmt: skip
    d_error = tl.zeros((BLOCK_V,), dtype=dtype)
    on_weights = tl.zeros((ALL_J,), dtype=dtype)
    for first in range(0, HEADS * TOP_K, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        moves = j < n_written
        access = first_access + j
        factor = tl.load(factors + access, moves, 0.0)
        weight = tl.load(weights + access, moves, 0.0) * factor
        slot = tl.load(slots + access, moves, 0)
        rows = later_rows(access, d_row_first + slot, moves, later, d_table, after, v_index, VALUE, GIVEN, ALIGN)
        d_error += tl.sum(weight[:, None] * rows, axis=0)
        on_weight = factor * tl.sum(rows * error[None, :], axis=1)
        on_weights += tl.sum(tl.where(all_j[:, None] == j[None, :], on_weight[None, :], 0.0), axis=1)
    step = tl.where(written, token_weight * d_error, 0.0)
    d_row += step
    tl.store(d_v + (token + lookahead) * VALUE + v_index, -step, written)
    # The first L tokens of a chunk are no targets.
    no_target = v_index < tl.where(query % n_chunk < lookahead, VALUE, 0)
    tl.store(d_v + token * VALUE + v_index, tl.zeros((BLOCK_V,), dtype=dtype), no_target)
    if GATED:
        on_gate = tl.sum(d_error * difference, axis=0)
        if MASKED:
            on_gate = on_gate * tl.load(mask + token).to(dtype)
        tl.store(d_gate + token, on_gate)
    scratch = (memory.to(tl.int64) * n_rows * n_chunk + query) * VALUE
    tl.store(d_read + scratch + v_index, d_row, inside)

    for first in range(0, HEADS * TOP_K, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        listed = j < HEADS * TOP_K
        if HEADS * TOP_K <= BLOCK_J:
            rows = all_rows
        else:
            slot = tl.load(slots + first_access + j, listed, 0)
            rows = read_again(
                first_access + j, table_row + slot, listed, table, versions, before, v_index, VALUE, ALIGN
            )  # fmt: skip
        on_weight = tl.sum(rows * d_row[None, :], axis=1)
        on_weights += tl.sum(tl.where(all_j[:, None] == j[None, :], on_weight[None, :], 0.0), axis=1)

    listed = all_j < HEADS * TOP_K
    weight = tl.load(weights + first_access + all_j, listed, 0.0)
    if ADD_WEIGHTS:
        on_weights += tl.load(d_weights + first_access + all_j, listed, 0.0)
    # Backward of the softmax, then from the pairs to the two halves whose scores they add.
    on_scores = weight * (on_weights - tl.sum(weight * on_weights, axis=0)) / temperature
    pair = tl.load(pairs + first_access + all_j, listed, 0)
    head, place = all_j // TOP_K, all_j % TOP_K
    same_head = (head[:, None] == head[None, :]) & listed[None, :]
    first_half = same_head & (place[:, None] == (pair // TOP_K)[None, :])
    second_half = same_head & (place[:, None] == (pair % TOP_K)[None, :])
    entry = (token * HEADS + head) * 2 * TOP_K + place
    tl.store(d_half + entry, tl.sum(tl.where(first_half, on_scores[None, :], 0.0), axis=1), listed)
    tl.store(d_half + entry + TOP_K, tl.sum(tl.where(second_half, on_scores[None, :], 0.0), axis=1), listed)
