"""Backward of the addressing and its step, as far as it stays with a half query: two parts around a mean."""

from __future__ import annotations

import triton
import triton.language as tl

from mixers.kernels.address import half_queries
from mixers.kernels.key_step import entropy_slope


@triton.jit
def direction_rows(
    tile, q, later, key_dots, indices, measures, probabilities, directions, tangents,
    n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, TOP_K: tl.constexpr,
    IDW: tl.constexpr, IDW_EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of a tile of half queries: the direction along which the addressing step's Hessian is needed, and its tangent.

    With G = ``later`` (M,H,2,n,K/2), the derivative of the keys after the chunk: r_ti = 2 <key_i - q_t, G_i> (idw) or
    <q_t, G_i> (dot); tangent: the change of the k probabilities along r. ``key_dots`` (M,H,2,n): <key_i, G_i>.

    Bytes per token: 2 H k K/2 elements of G (from the L2 cache), H K of q.
    """
    _, q_row, exists, memory, half_head = half_queries(tile, n_rows, n_chunk, n_tokens, start, HEADS, ROWS)
    place = tl.arange(0, BLOCK_K)
    listed = exists[:, None] & (place < TOP_K)[None, :]
    entry = q_row[:, None] * TOP_K + place[None, :]
    index = tl.load(indices + entry, listed, 0)
    key_row = (memory * (2 * HEADS) + half_head).to(tl.int64)[:, None] * SUBKEYS + index
    direction = tl.zeros(index.shape, dtype=q.dtype.element_ty)
    # Few elements of many rows at a time: what queries have in common is still near when the next one needs it.
    for first in range(0, HALF, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], exists[:, None] & (d < HALF)[None, :], 0.0)
        inside = listed[:, :, None] & (d < HALF)[None, None, :]
        later_tile = tl.load(later + key_row[:, :, None] * HALF + d[None, None, :], inside, 0.0)
        direction += tl.sum(q_tile[:, None, :] * later_tile, axis=2)
    if IDW:
        direction = 2 * (tl.load(key_dots + key_row, listed, 0.0) - direction)
    if IDW:
        score_direction = -direction / (IDW_EPS + tl.load(measures + entry, listed, 0.0))
    else:
        score_direction = direction
    share = tl.load(probabilities + entry, listed, 0.0)
    tangent = share * (score_direction - tl.sum(share * score_direction, axis=1)[:, None])
    tl.store(directions + entry, direction, listed)
    tl.store(tangents + entry, tangent, listed)


@triton.jit
def gradient_rows(
    tile, q, keys, later, indices, measures, probabilities, directions, tangents, d_half, mean, tangent_sums,
    d_q, coefficients, lr, address_weight, n_shares, n_memories, n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, TOP_K: tl.constexpr,
    IDW: tl.constexpr, IDW_EPS: tl.constexpr, ENTROPY_EPS: tl.constexpr, STEP: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of a tile of half queries: their part of d_q (M,R,T,H,K), and their coefficients on the keys' derivative.

    c_ti: derivative with respect to the measure of a listed sub-key, from the half scores (``d_half``) and, if STEP,
    -lr times the Hessian of the addressing loss along the direction; W_ti: that loss's gradient. ``tangent_sums``
    (SPLITS,M,2,n): the sums of the tangents, in parts.

        idw: x = 2 c, y = -2 lr W;  dq_t = sum_i x_ti (q_t - key_i) - y_ti G_i
        dot: x = c,   y = -lr W;    dq_t = sum_i x_ti key_i + y_ti G_i

    x goes to ``coefficients`` (M,R,T,H,2,k). Bytes per token: 2 H k K/2 key and G elements, each (from the L2 cache),
    2 H K of q and d_q.
    """
    _, q_row, exists, memory, half_head = half_queries(tile, n_rows, n_chunk, n_tokens, start, HEADS, ROWS)
    place = tl.arange(0, BLOCK_K)
    listed = exists[:, None] & (place < TOP_K)[None, :]
    entry = q_row[:, None] * TOP_K + place[None, :]
    index = tl.load(indices + entry, listed, 0)
    coefficient = tl.load(d_half + entry, listed, 0.0)
    inverse = 1.0
    if IDW:
        inverse = 1.0 / (IDW_EPS + tl.load(measures + entry, listed, 0.0))
        coefficient = -coefficient * inverse
    later_coefficient = tl.zeros((ROWS, BLOCK_K), dtype=q.dtype.element_ty)
    if STEP:
        use = (memory * 2 * SUBKEYS + half_head % 2 * SUBKEYS)[:, None] + index
        used = tl.load(mean + use, listed, 1.0)
        share = tl.load(probabilities + entry, listed, 0.0)
        tangent = tl.load(tangents + entry, listed, 0.0)
        slope, on_score = entropy_slope(share, used, address_weight, n_shares, listed, ENTROPY_EPS)
        near = 1.0 / (used + ENTROPY_EPS)
        used_tangent = tl.zeros((ROWS, BLOCK_K), dtype=q.dtype.element_ty)
        for split in tl.static_range(SPLITS):
            used_tangent += tl.load(tangent_sums + split * n_memories * (2 * SUBKEYS) + use, listed, 0.0)
        slope_tangent = address_weight * (near + ENTROPY_EPS * near * near) * (used_tangent / n_shares) / n_shares
        inner = tl.sum(share * slope, axis=1)[:, None]
        inner_tangent = tl.sum(tangent * slope + share * slope_tangent, axis=1)[:, None]
        on_score_tangent = tangent * (slope - inner) + share * (slope_tangent - inner_tangent)
        if IDW:
            direction = tl.load(directions + entry, listed, 0.0)
            # W = -ds / (eps + d), its change along the direction: -ds' / (eps + d) + ds r / (eps + d)^2.
            coefficient -= lr * inverse * (on_score * inverse * direction - on_score_tangent)
            later_coefficient = 2 * lr * on_score * inverse
        else:
            coefficient -= lr * on_score_tangent
            later_coefficient = -lr * on_score
    if IDW:
        coefficient = 2 * coefficient
    tl.store(coefficients + entry, coefficient, listed)

    # Sub-keys' rows by place, then half query: a thread holds what one half query needs of all places.
    flat = tl.arange(0, BLOCK_K * ROWS)
    flat_row = tl.min(q_row, axis=0) + flat % ROWS
    flat_listed = (flat % ROWS < tl.sum(exists.to(tl.int32), axis=0)) & (flat // ROWS < TOP_K)
    flat_index = tl.load(indices + flat_row * TOP_K + flat // ROWS, flat_listed, 0)
    key_row = (memory * (2 * HEADS) + flat_row % (2 * HEADS)) * SUBKEYS + flat_index
    coefficient = tl.trans(coefficient)
    later_coefficient = tl.trans(later_coefficient)
    for first in range(0, HALF, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        q_inside = exists[:, None] & (d < HALF)[None, :]
        inside = flat_listed[:, None] & (d < HALF)[None, :]
        offset = key_row[:, None] * HALF + d[None, :]
        key_tile = tl.reshape(tl.load(keys + offset, inside, 0.0), (BLOCK_K, ROWS, BLOCK_D))
        if IDW:
            q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], q_inside, 0.0)
            gradient = tl.sum(coefficient[:, :, None] * (q_tile[None, :, :] - key_tile), axis=0)
        else:
            gradient = tl.sum(coefficient[:, :, None] * key_tile, axis=0)
        if STEP:
            later_tile = tl.reshape(tl.load(later + offset, inside, 0.0), (BLOCK_K, ROWS, BLOCK_D))
            moved = tl.sum(later_coefficient[:, :, None] * later_tile, axis=0)
            gradient = gradient - moved if IDW else gradient + moved
        tl.store(d_q + q_row[:, None] * HALF + d[None, :], gradient, q_inside)
