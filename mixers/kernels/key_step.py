"""Move sub-keys by the coefficients of the queries that list them: the addressing step, and its backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk, token_of
from mixers.product_keys import IDW_EPS

ENTROPY_EPS = 1e-8


@triton.jit
def entropy_slope(share, mean, weight, listed, EPS: tl.constexpr):
    """d A / d half score of the listed sub-keys: the softmax backward of w (log(Pbar + eps) + Pbar / (Pbar + eps)).

    share, mean and listed are (S,k), weight is w / (S*H). Returns the slope before and after the softmax's backward.
    """
    slope = tl.where(listed, weight * (tl.log(mean + EPS) + mean / (mean + EPS)), 0.0)
    return slope, share * (slope - tl.sum(share * slope, axis=1)[:, None])


@triton.jit(do_not_specialize=["n_rows", "n_chunk", "n_tokens", "start"])
def key_step_kernel(
    q,  # (M,R,T,H,K)
    base,  # (M,H,2,n,K/2)
    keys,  # (M,H,2,n,K/2)
    indices,  # (M,R,T,H,2,k) int32
    measures,  # (M,R,T,H,2,k), DESCEND only
    probabilities,  # (M,R,T,H,2,k), DESCEND only
    mean,  # (M,2,n), DESCEND only
    coefficients,  # (M,R,T,H,2,k), not DESCEND
    base_coefficients,  # (M,R,T,H,2,k), not DESCEND
    moved,  # out (M,H,2,n,K/2)
    lr,
    slope_weight,
    n_rows,
    n_chunk,
    n_tokens,
    start,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    HALF: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    IDW_EPS: tl.constexpr,
    ENTROPY_EPS: tl.constexpr,
    DESCEND: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n_blocks_d = (HALF + BLOCK_D - 1) // BLOCK_D
    subkey = tl.program_id(0) // n_blocks_d * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(0) % n_blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    half = tl.program_id(1) % 2
    head = tl.program_id(1) // 2
    memory = tl.program_id(2)
    place = tl.arange(0, BLOCK_K)
    dtype = q.dtype.element_ty
    pulled = tl.zeros((BLOCK_N, BLOCK_D), dtype=dtype)
    colsum = tl.zeros((BLOCK_N,), dtype=dtype)
    base_colsum = tl.zeros((BLOCK_N,), dtype=dtype)
    for first in range(0, QUERIES, BLOCK_S):
        query = first + tl.arange(0, BLOCK_S)
        exists = query < QUERIES
        token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
        q_row = (token * HEADS + head) * 2 + half
        entry = q_row[:, None] * TOP_K + place[None, :]
        listed = exists[:, None] & (place < TOP_K)[None, :]
        index = tl.load(indices + entry, listed, -1)
        if DESCEND:
            share = tl.load(probabilities + entry, listed, 0.0)
            used = tl.load(mean + (memory * 2 + half) * SUBKEYS + index, listed, 1.0)
            _, coefficient = entropy_slope(share, used, slope_weight, listed, ENTROPY_EPS)
            if IDW:
                measure = tl.load(measures + entry, listed, 0.0)
                coefficient = coefficient * (2 * lr) / (IDW_EPS + measure)
            else:
                coefficient = coefficient * -lr
        else:
            coefficient = tl.load(coefficients + entry, listed, 0.0)
        lists = index[None, :, :] == subkey[:, None, None]
        matrix = tl.sum(tl.where(lists, coefficient[None, :, :], 0.0), axis=2)
        if IDW:
            colsum += tl.sum(matrix, axis=1)
            if not DESCEND:
                base_coefficient = tl.load(base_coefficients + entry, listed, 0.0)
                base_colsum += tl.sum(tl.sum(tl.where(lists, base_coefficient[None, :, :], 0.0), axis=2), axis=1)
        q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], exists[:, None] & (d < HALF)[None, :], 0.0)
        pulled = tl.dot(matrix, q_tile, pulled, input_precision="tf32x3", out_dtype=dtype)

    row = ((memory * HEADS + head) * 2 + half).to(tl.int64) * SUBKEYS + subkey
    entry = row[:, None] * HALF + d[None, :]
    inside = (subkey < SUBKEYS)[:, None] & (d < HALF)[None, :]
    result = tl.load(base + entry, inside, 0.0)
    if IDW:
        key = tl.load(keys + entry, inside, 0.0)
        result = result + base_colsum[:, None] * result + (colsum[:, None] * key - pulled)
    else:
        result = result + pulled
    tl.store(moved + entry, result, inside)


def descend_entropy(
    q: Tensor,
    keys: Tensor,
    indices: Tensor,
    measures: Tensor,
    probabilities: Tensor,
    mean: Tensor,
    moved: Tensor,
    chunk: Chunk,
    score: str,
    lr: float,
    address_weight: float,
) -> None:
    """moved = keys - lr * dA/dkeys, A = w * sum_i Pbar_i log(Pbar_i + 1e-8) per half; ``moved`` may be ``keys``.

    With the coefficient x_ti of each listed sub-key, idw: moved_i = key_i (1 + sum_t x_ti) - sum_t x_ti q_t, dot:
    key_i + sum_t x_ti q_t. The sparse (n,S) matrix of coefficients is made tile by tile and multiplied densely (three
    tf32 products): its time does not depend on how the queries spread over the sub-keys.

    Bytes: q of the chunk once per BLOCK_N sub-keys (from the L2 cache), keys once in, once out. 2 M S H n K operations,
    three times over on tensor cores, and as many comparisons as M S H 2 n k K / (2 BLOCK_D).
    """
    slope_weight = address_weight / (chunk.n_queries * keys.shape[1])
    _launch(
        q, keys, keys, indices, measures, probabilities, mean, measures, measures, moved,
        lr, slope_weight, chunk, score, descend=True,
    )  # fmt: skip


def key_step_backward(
    q: Tensor,
    keys: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    base_coefficients: Tensor,
    moved_gradient: Tensor,
    gradient: Tensor,
    chunk: Chunk,
    score: str,
) -> None:
    """gradient (M,H,2,n,K/2) of the keys before the chunk, from that of the keys after it.

    With x and y of :func:`mixers.kernels.key_backward.key_gradients`, idw: gradient_i = moved_i (1 + sum_t y_ti) +
    key_i sum_t x_ti - sum_t x_ti q_t; dot: moved_i + sum_t x_ti q_t. ``gradient`` may be ``moved_gradient``.
    """
    _launch(
        q, moved_gradient, keys, indices, coefficients, coefficients, coefficients, coefficients, base_coefficients,
        gradient, 0.0, 0.0, chunk, score, descend=False,
    )  # fmt: skip


def _launch(
    q, base, keys, indices, measures, probabilities, mean, coefficients, base_coefficients, moved,
    lr, slope_weight, chunk, score, *, descend,
) -> None:  # fmt: skip
    n_memories, n_heads, _, n_subkeys, half_dim = keys.shape
    top_k = indices.shape[-1]
    block_k = triton.next_power_of_2(top_k)
    block_n = 32 if block_k <= 16 else 16
    block_d = max(16, min(64, triton.next_power_of_2(half_dim)))
    grid = (triton.cdiv(n_subkeys, block_n) * triton.cdiv(half_dim, block_d), 2 * n_heads, n_memories)
    key_step_kernel[grid](
        q,
        base,
        keys,
        indices,
        measures,
        probabilities,
        mean,
        coefficients,
        base_coefficients,
        moved,
        lr,
        slope_weight,
        chunk.n_rows,
        chunk.n_chunk,
        chunk.n_tokens,
        chunk.start,
        QUERIES=chunk.n_queries,
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        HALF=half_dim,
        TOP_K=top_k,
        IDW=score == "idw",
        IDW_EPS=IDW_EPS,
        ENTROPY_EPS=ENTROPY_EPS,
        DESCEND=descend,
        BLOCK_S=32 if block_k <= 8 else 16,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        BLOCK_K=block_k,
        num_warps=4,
    )
