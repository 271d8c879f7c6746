"""Backward of the addressing and of the addressing step, as far as it stays with a query: two kernels around a mean."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk, token_of
from mixers.kernels.key_step import ENTROPY_EPS, entropy_slope
from mixers.kernels.launch import launch
from mixers.product_keys import IDW_EPS


@triton.jit(do_not_specialize=["n_rows", "n_chunk", "n_tokens", "start"])
def key_direction_kernel(
    q,  # (M,R,T,H,K)
    keys,  # (M,H,2,n,K/2)
    later,  # (M,H,2,n,K/2)
    indices,  # (M,R,T,H,2,k) int32
    measures,
    probabilities,  # (M,R,T,H,2,k)
    directions,  # out (M,R,T,H,2,k)
    tangents,  # out (M,R,T,H,2,k)
    n_rows,
    n_chunk,
    n_tokens,
    start,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    HALF: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    IDW_EPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    memory = tl.program_id(2)
    query = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = query < n_rows * n_chunk
    token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
    q_row = token * (HEADS * 2) + tl.program_id(1)
    table = (memory * (HEADS * 2) + tl.program_id(1)).to(tl.int64) * SUBKEYS
    place = tl.arange(0, BLOCK_K)
    listed = exists[:, None] & (place < TOP_K)[None, :]
    entry = q_row[:, None] * TOP_K + place[None, :]
    index = tl.load(indices + entry, listed, 0)
    direction = tl.zeros((BLOCK_S, BLOCK_K), dtype=q.dtype.element_ty)
    for first in range(0, HALF, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], exists[:, None] & (d < HALF)[None, :], 0.0)
        inside = listed[:, :, None] & (d < HALF)[None, None, :]
        offset = (table + index)[:, :, None] * HALF + d[None, None, :]
        later_tile = tl.load(later + offset, inside, 0.0)
        if IDW:
            key_tile = tl.load(keys + offset, inside, 0.0)
            direction += 2 * tl.sum((key_tile - q_tile[:, None, :]) * later_tile, axis=2)
        else:
            direction += tl.sum(q_tile[:, None, :] * later_tile, axis=2)
    if IDW:
        measure = tl.load(measures + entry, listed, 0.0)
        score_direction = -direction / (IDW_EPS + measure)
    else:
        score_direction = direction
    share = tl.load(probabilities + entry, listed, 0.0)
    tangent = share * (score_direction - tl.sum(share * score_direction, axis=1)[:, None])
    tl.store(directions + entry, direction, listed)
    tl.store(tangents + entry, tangent, listed)


def key_direction(
    q: Tensor,
    keys: Tensor,
    later: Tensor,
    indices: Tensor,
    measures: Tensor,
    probabilities: Tensor,
    directions: Tensor,
    tangents: Tensor,
    chunk: Chunk,
    score: str,
) -> None:
    """The direction along which the addressing step's Hessian is needed, and how the half's softmax moves along it.

    With G = ``later`` (M,H,2,n,K/2), the derivative of the keys after the chunk: r_ti = 2 <key_i - q_t, G_i> (idw) or
    <q_t, G_i> (dot); tangent: the change of the k probabilities along r. Bytes per token: 2 H k K/2 key and G
    elements, each (from the L2 cache).
    """
    n_heads, n_subkeys, half_dim = keys.shape[1], keys.shape[3], keys.shape[4]
    top_k = indices.shape[-1]
    block_k = triton.next_power_of_2(top_k)
    block_s = max(1, min(8, 32 // block_k))
    launch(
        key_direction_kernel,
        (triton.cdiv(chunk.n_queries, block_s), 2 * n_heads, chunk.n_memories),
        q,
        keys,
        later,
        indices,
        measures,
        probabilities,
        directions,
        tangents,
        *chunk.sizes,
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        HALF=half_dim,
        TOP_K=top_k,
        IDW=score == "idw",
        IDW_EPS=IDW_EPS,
        BLOCK_S=block_s,
        BLOCK_D=min(128, triton.next_power_of_2(half_dim)),
        BLOCK_K=block_k,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["n_rows", "n_chunk", "n_tokens", "start"])
def key_gradients_kernel(
    q,  # (M,R,T,H,K)
    keys,  # (M,H,2,n,K/2)
    later,  # (M,H,2,n,K/2), STEP only
    indices,  # (M,R,T,H,2,k) int32
    measures,
    probabilities,
    directions,
    tangents,
    d_half,  # (M,R,T,H,2,k)
    mean,
    mean_tangent,  # (M,2,n), STEP only
    d_q,  # out (M,R,T,H,K)
    coefficients,  # out (M,R,T,H,2,k)
    later_coefficients,  # out (M,R,T,H,2,k), STEP only
    lr,
    slope_weight,
    n_rows,
    n_chunk,
    n_tokens,
    start,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    HALF: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    IDW_EPS: tl.constexpr,
    ENTROPY_EPS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    memory = tl.program_id(2)
    half = tl.program_id(1) % 2
    query = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = query < n_rows * n_chunk
    token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
    q_row = token * (HEADS * 2) + tl.program_id(1)
    table = (memory * (HEADS * 2) + tl.program_id(1)).to(tl.int64) * SUBKEYS
    place = tl.arange(0, BLOCK_K)
    listed = exists[:, None] & (place < TOP_K)[None, :]
    entry = q_row[:, None] * TOP_K + place[None, :]
    index = tl.load(indices + entry, listed, 0)
    coefficient = tl.load(d_half + entry, listed, 0.0)
    inverse = 1.0
    if IDW:
        inverse = 1.0 / (IDW_EPS + tl.load(measures + entry, listed, 0.0))
        coefficient = -coefficient * inverse
    later_coefficient = tl.zeros((BLOCK_S, BLOCK_K), dtype=q.dtype.element_ty)
    if STEP:
        use = (memory * 2 + half) * SUBKEYS + index
        used = tl.load(mean + use, listed, 1.0)
        share = tl.load(probabilities + entry, listed, 0.0)
        tangent = tl.load(tangents + entry, listed, 0.0)
        slope, on_score = entropy_slope(share, used, slope_weight, listed, ENTROPY_EPS)
        near = 1.0 / (used + ENTROPY_EPS)
        slope_tangent = slope_weight * (near + ENTROPY_EPS * near * near) * tl.load(mean_tangent + use, listed, 0.0)
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

    for first in range(0, HALF, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        q_inside = exists[:, None] & (d < HALF)[None, :]
        inside = listed[:, :, None] & (d < HALF)[None, None, :]
        offset = (table + index)[:, :, None] * HALF + d[None, None, :]
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


def key_gradients(
    q: Tensor,
    keys: Tensor,
    later: Tensor | None,
    indices: Tensor,
    measures: Tensor,
    probabilities: Tensor,
    directions: Tensor,
    tangents: Tensor,
    d_half: Tensor,
    mean: Tensor,
    mean_tangent: Tensor,
    d_q: Tensor,
    coefficients: Tensor,
    later_coefficients: Tensor,
    chunk: Chunk,
    score: str,
    lr: float,
    address_weight: float,
) -> None:
    """The chunk's part of d_q (M,R,T,H,K), and the coefficients that its queries have on the keys' derivative.

    c_ti: derivative with respect to the measure of a listed sub-key, from the half scores (``d_half``) and, unless
    ``later`` is None, -lr times the Hessian of the addressing loss along the direction; W_ti: that loss's gradient.

        idw: x = 2 c, y = -2 lr W;  dq_t = sum_i x_ti (q_t - key_i) - y_ti G_i
        dot: x = c,   y = -lr W;    dq_t = sum_i x_ti key_i + y_ti G_i

    x goes to ``coefficients``, y to ``later_coefficients`` (M,R,T,H,2,k). Bytes per token: 2 H k K/2 key and G
    elements, each (from the L2 cache), 2 H K of q and d_q.
    """
    n_heads, n_subkeys, half_dim = keys.shape[1], keys.shape[3], keys.shape[4]
    top_k = indices.shape[-1]
    block_k = triton.next_power_of_2(top_k)
    block_s = max(1, min(8, 32 // block_k))
    launch(
        key_gradients_kernel,
        (triton.cdiv(chunk.n_queries, block_s), 2 * n_heads, chunk.n_memories),
        q,
        keys,
        keys if later is None else later,
        indices,
        measures,
        probabilities,
        directions,
        tangents,
        d_half,
        mean,
        mean_tangent,
        d_q,
        coefficients,
        later_coefficients,
        lr,
        address_weight / (chunk.n_queries * n_heads),
        *chunk.sizes,
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        HALF=half_dim,
        TOP_K=top_k,
        IDW=score == "idw",
        IDW_EPS=IDW_EPS,
        ENTROPY_EPS=ENTROPY_EPS,
        STEP=later is not None,
        BLOCK_S=block_s,
        BLOCK_D=min(128, triton.next_power_of_2(half_dim)),
        BLOCK_K=block_k,
        num_warps=4,
    )
