"""Backward of the addressing and its step, as far as it stays with a half query: two parts around a mean."""

from __future__ import annotations

import triton
import triton.language as tl

from mixers.kernels.address import half_query
from mixers.kernels.key_step import entropy_slope


@triton.jit
def direction_rows(
    row, q, keys, later, indices, measures, probabilities, directions, tangents, places, n_rows_all, n_queries, n_most,
    n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, TOP_K: tl.constexpr,
    IDW: tl.constexpr, IDW_EPS: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of half queries ``row``: the direction along which the addressing step's Hessian is needed, and its tangent.

    With G = ``later`` (M,H,2,n,K/2), the derivative of the keys after the chunk: r_ti = 2 <key_i - q_t, G_i> (idw) or
    <q_t, G_i> (dot); tangent: the change of the k probabilities along r. Neither if not STEP. In any case ``places``
    receives who lists whom, as from :func:`mixers.kernels.address.address_rows`.

    Bytes per token: 2 H k K/2 key and G elements, each (from the L2 cache).
    """
    exists = row < n_rows_all
    q_row, memory, query, half_head = half_query(row, n_queries, n_rows, n_chunk, n_tokens, start, HEADS)
    place = tl.arange(0, BLOCK_K)
    listed = exists[:, None] & (place < TOP_K)[None, :]
    entry = q_row[:, None] * TOP_K + place[None, :]
    index = tl.load(indices + entry, listed, 0)
    key_row = (memory * (2 * HEADS) + half_head).to(tl.int64)[:, None] * SUBKEYS + index
    tl.store(places + key_row * n_most + query[:, None], (place + 1).to(tl.int8)[None, :], listed)
    if STEP:
        direction = tl.zeros(index.shape, dtype=q.dtype.element_ty)
        for first in range(0, HALF, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], exists[:, None] & (d < HALF)[None, :], 0.0)
            inside = listed[:, :, None] & (d < HALF)[None, None, :]
            offset = key_row[:, :, None] * HALF + d[None, None, :]
            later_tile = tl.load(later + offset, inside, 0.0)
            if IDW:
                key_tile = tl.load(keys + offset, inside, 0.0)
                direction += 2 * tl.sum((key_tile - q_tile[:, None, :]) * later_tile, axis=2)
            else:
                direction += tl.sum(q_tile[:, None, :] * later_tile, axis=2)
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
    row, q, keys, later, indices, measures, probabilities, directions, tangents, d_half, mean, mean_tangent,
    d_q, coefficients, later_coefficients, lr, address_weight, n_shares, n_rows_all, n_queries,
    n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, TOP_K: tl.constexpr,
    IDW: tl.constexpr, IDW_EPS: tl.constexpr, ENTROPY_EPS: tl.constexpr, STEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of half queries ``row``: their part of d_q (M,R,T,H,K), and their coefficients on the keys' derivative.

    c_ti: derivative with respect to the measure of a listed sub-key, from the half scores (``d_half``) and, if STEP,
    -lr times the Hessian of the addressing loss along the direction; W_ti: that loss's gradient.

        idw: x = 2 c, y = -2 lr W;  dq_t = sum_i x_ti (q_t - key_i) - y_ti G_i
        dot: x = c,   y = -lr W;    dq_t = sum_i x_ti key_i + y_ti G_i

    x goes to ``coefficients``, y to ``later_coefficients`` (M,R,T,H,2,k). Bytes per token: 2 H k K/2 key and G
    elements, each (from the L2 cache), 2 H K of q and d_q.
    """
    exists = row < n_rows_all
    q_row, memory, _, half_head = half_query(row, n_queries, n_rows, n_chunk, n_tokens, start, HEADS)
    place = tl.arange(0, BLOCK_K)
    listed = exists[:, None] & (place < TOP_K)[None, :]
    entry = q_row[:, None] * TOP_K + place[None, :]
    index = tl.load(indices + entry, listed, 0)
    coefficient = tl.load(d_half + entry, listed, 0.0)
    inverse = 1.0
    if IDW:
        inverse = 1.0 / (IDW_EPS + tl.load(measures + entry, listed, 0.0))
        coefficient = -coefficient * inverse
    later_coefficient = tl.zeros(index.shape, dtype=q.dtype.element_ty)
    if STEP:
        use = ((memory * 2 + half_head % 2) * SUBKEYS)[:, None] + index
        used = tl.load(mean + use, listed, 1.0)
        share = tl.load(probabilities + entry, listed, 0.0)
        tangent = tl.load(tangents + entry, listed, 0.0)
        slope, on_score = entropy_slope(share, used, address_weight, n_shares, listed, ENTROPY_EPS)
        near = 1.0 / (used + ENTROPY_EPS)
        used_tangent = tl.load(mean_tangent + use, listed, 0.0)
        slope_tangent = address_weight * (near + ENTROPY_EPS * near * near) * used_tangent / n_shares
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
        tl.store(later_coefficients + entry, later_coefficient, listed)
    if IDW:
        coefficient = 2 * coefficient
    tl.store(coefficients + entry, coefficient, listed)

    key_row = (memory * (2 * HEADS) + half_head).to(tl.int64)[:, None] * SUBKEYS + index
    for first in range(0, HALF, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        q_inside = exists[:, None] & (d < HALF)[None, :]
        inside = listed[:, :, None] & (d < HALF)[None, None, :]
        offset = key_row[:, :, None] * HALF + d[None, None, :]
        key_tile = tl.load(keys + offset, inside, 0.0)
        if IDW:
            q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], q_inside, 0.0)
            gradient = tl.sum(coefficient[:, :, None] * (q_tile[:, None, :] - key_tile), axis=1)
        else:
            gradient = tl.sum(coefficient[:, :, None] * key_tile, axis=1)
        if STEP:
            later_tile = tl.load(later + offset, inside, 0.0)
            moved = tl.sum(later_coefficient[:, :, None] * later_tile, axis=1)
            gradient = gradient - moved if IDW else gradient + moved
        tl.store(d_q + q_row[:, None] * HALF + d[None, :], gradient, q_inside)
