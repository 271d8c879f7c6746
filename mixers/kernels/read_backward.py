"""Backward of a token's read and of what it wrote, for everything but the table and the keys."""

from __future__ import annotations

import triton
import triton.language as tl

from mixers.kernels.chunk import token_of


@triton.jit
def token_backward(
    query, memory, later, before, slots, groups, factors, weights, pairs, read, v, pair_weight, d_out, d_weights,
    temperature, d_read, d_v, d_pair_weight, d_half,
    touched, n_table, n_rows, n_chunk, n_tokens, start, lookahead,
    HEADS: tl.constexpr, TOP_K: tl.constexpr, VALUE: tl.constexpr, ADD_WEIGHTS: tl.constexpr,
    TOUCH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_V: tl.constexpr, ALL_J: tl.constexpr,
):  # fmt: skip
    """Derivatives of one token's read and error.

    With M = ``later`` (M*N,V) the derivative of the table after the chunk, f_tj = ``factors`` (E,), the row's
    -lr scale / cnt, and w_t = ``pair_weight``:

        de_t = sum_j a_tj f_tj M[slot_tj];  dread_t = dout_t + w_t de_t;  dv_{t+L} = -w_t de_t
        dw_t = <de_t, read_t - v_{t+L}>
        da_tj = <f_tj M[slot_tj], w_t (read_t - v_{t+L})> + <dread_t, before[slot_tj]>

    and da carried through the softmax to the half scores, ``d_half`` (M,R,T,H,2,k). ``before`` (E,V) holds the rows
    that the chunk overwrote, at the positions ``groups`` (E,) of the accesses. ``d_read`` (M,S,V) is scratch. With
    TOUCH rows of M that ``touched`` (M*N,) doesn't name are 0.

    Bytes per token: J V of ``later``, J V of ``before``, 5 V of the tokens' rows.
    """
    token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
    dtype = d_out.dtype.element_ty
    v_index = tl.arange(0, BLOCK_V)
    inside = v_index < VALUE
    all_j = tl.arange(0, ALL_J)
    first_row = memory.to(tl.int64) * n_table
    first_access = token * (HEADS * TOP_K)
    writes = query % n_chunk + lookahead < n_chunk
    # Not ``block & writes``: of a block and a scalar some of triton's interpreters make no mask.
    written = v_index < tl.where(writes, VALUE, 0)
    n_written = tl.where(writes, HEADS * TOP_K, 0)
    target = tl.load(v + (token + lookahead) * VALUE + v_index, written, 0.0)
    difference = tl.load(read + token * VALUE + v_index, written, 0.0) - target
    token_weight = tl.load(pair_weight + token)
    d_row = tl.load(d_out + token * VALUE + v_index, inside, 0.0)
    error = tl.where(written, token_weight * difference, 0.0)
    d_error = tl.zeros((BLOCK_V,), dtype=dtype)
    on_weights = tl.zeros((ALL_J,), dtype=dtype)
    for first in range(0, HEADS * TOP_K, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        moves = j < n_written
        access = first_access + j
        factor = tl.load(factors + access, moves, 0.0)
        weight = tl.load(weights + access, moves, 0.0) * factor
        row = first_row + tl.load(slots + access, moves, 0)
        if TOUCH:
            moves = moves & (tl.load(touched + row, moves, 0) != 0)
        rows = tl.load(later + row[:, None] * VALUE + v_index[None, :], moves[:, None] & inside[None, :], 0.0)
        d_error += tl.sum(weight[:, None] * rows, axis=0)
        on_weight = factor * tl.sum(rows * error[None, :], axis=1)
        on_weights += tl.sum(tl.where(all_j[:, None] == j[None, :], on_weight[None, :], 0.0), axis=1)
    step = tl.where(written, token_weight * d_error, 0.0)
    d_row += step
    tl.store(d_v + (token + lookahead) * VALUE + v_index, -step, written)
    tl.store(d_pair_weight + token, tl.sum(d_error * difference, axis=0))
    scratch = (memory.to(tl.int64) * n_rows * n_chunk + query) * VALUE
    tl.store(d_read + scratch + v_index, d_row, inside)

    for first in range(0, HEADS * TOP_K, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        listed = j < HEADS * TOP_K
        group = tl.load(groups + first_access + j, listed, 0)
        rows = tl.load(before + group[:, None] * VALUE + v_index[None, :], listed[:, None] & inside[None, :], 0.0)
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
