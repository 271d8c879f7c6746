"""Move sub-keys by the coefficients of the queries that list them: the addressing step, and its backward."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk, token_of
from mixers.kernels.launch import launch
from mixers.product_keys import IDW_EPS

ENTROPY_EPS = 1e-8
QUERIES_PER_SPLIT, MAX_SPLITS = 128, 16


class KeyPulls(NamedTuple):
    """Scratch of the key step: the sums of each split of a chunk's queries, P = :func:`n_splits` of them.

    pulls (P,M,H,2,n,K/2). sums (2,P,M,H,2,n): of the coefficients, and of the base's.
    """

    pulls: Tensor
    sums: Tensor


def n_splits(n_queries: int) -> int:
    """Parts in which a chunk's queries are summed, each by programs of its own."""
    return min(MAX_SPLITS, triton.cdiv(n_queries, QUERIES_PER_SPLIT))


def key_pulls(keys: Tensor, n_queries: int) -> KeyPulls:
    """Scratch for keys (M,H,2,n,K/2) and chunks of up to ``n_queries`` a memory."""
    parts = n_splits(n_queries)
    return KeyPulls(keys.new_empty(parts, *keys.shape), keys.new_empty(2, parts, *keys.shape[:-1]))


@triton.jit
def entropy_slope(share, mean, weight, listed, EPS: tl.constexpr):
    """d A / d half score of the listed sub-keys: the softmax backward of w (log(Pbar + eps) + Pbar / (Pbar + eps)).

    share, mean and listed are (S,k), weight is w / (S*H). Returns the slope before and after the softmax's backward.
    """
    slope = tl.where(listed, weight * (tl.log(mean + EPS) + mean / (mean + EPS)), 0.0)
    return slope, share * (slope - tl.sum(share * slope, axis=1)[:, None])


@triton.jit(do_not_specialize=["n_rows", "n_chunk", "n_tokens", "start"])
def entropy_coefficients_kernel(
    indices,  # (M,R,T,H,2,k) int32
    measures,  # (M,R,T,H,2,k)
    probabilities,  # (M,R,T,H,2,k)
    mean,  # (M,2,n)
    coefficients,  # out (M,R,T,H,2,k)
    lr,
    slope_weight,
    n_rows,
    n_chunk,
    n_tokens,
    start,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    IDW_EPS: tl.constexpr,
    ENTROPY_EPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    memory = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    query = row // (2 * HEADS)
    exists = query < n_rows * n_chunk
    token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
    half_head = row % (2 * HEADS)
    place = tl.arange(0, BLOCK_K)
    entry = (token * (2 * HEADS) + half_head)[:, None] * TOP_K + place[None, :]
    listed = exists[:, None] & (place < TOP_K)[None, :]
    index = tl.load(indices + entry, listed, 0)
    share = tl.load(probabilities + entry, listed, 0.0)
    used = tl.load(mean + ((memory * 2 + half_head % 2) * SUBKEYS)[:, None] + index, listed, 1.0)
    _, coefficient = entropy_slope(share, used, slope_weight, listed, ENTROPY_EPS)
    if IDW:
        coefficient = coefficient * (2 * lr) / (IDW_EPS + tl.load(measures + entry, listed, 0.0))
    else:
        coefficient = coefficient * -lr
    tl.store(coefficients + entry, coefficient, listed)


@triton.jit(do_not_specialize=["n_rows", "n_chunk", "n_tokens", "start"])
def pull_queries_kernel(
    q,  # (M,R,T,H,K)
    indices,  # (M,R,T,H,2,k) int32
    coefficients,  # (M,R,T,H,2,k)
    base_coefficients,  # (M,R,T,H,2,k), BASE only
    pulls,  # out (P,M,H,2,n,K/2)
    sums,  # out (P,M,H,2,n)
    base_sums,  # out (P,M,H,2,n), BASE only
    n_rows,
    n_chunk,
    n_tokens,
    start,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    HALF: tl.constexpr,
    TOP_K: tl.constexpr,
    BASE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n_blocks_d: tl.constexpr = (HALF + BLOCK_D - 1) // BLOCK_D
    block_d = tl.program_id(0) % n_blocks_d
    subkey = tl.program_id(0) // n_blocks_d * BLOCK_N + tl.arange(0, BLOCK_N)
    d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    half_head = tl.program_id(2) % (2 * HEADS)
    memory = tl.program_id(2) // (2 * HEADS)
    first = tl.program_id(1) * (TILES * BLOCK_S)
    dtype = q.dtype.element_ty
    pulled = tl.zeros((BLOCK_N, BLOCK_D), dtype=dtype)
    total = tl.zeros((BLOCK_N,), dtype=dtype)
    base_total = tl.zeros((BLOCK_N,), dtype=dtype)
    for tile in range(TILES):
        query = first + tile * BLOCK_S + tl.arange(0, BLOCK_S)
        exists = query < n_rows * n_chunk
        token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
        q_row = token * (2 * HEADS) + half_head
        q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], exists[:, None] & (d < HALF)[None, :], 0.0)
        # Place by place: a sum over a third axis would keep BLOCK_N x BLOCK_S x k entries in registers.
        matrix = tl.zeros((BLOCK_N, BLOCK_S), dtype=dtype)
        base_matrix = tl.zeros((BLOCK_N, BLOCK_S), dtype=dtype)
        for j in tl.static_range(TOP_K):
            index = tl.load(indices + q_row * TOP_K + j, exists, -1)
            coefficient = tl.load(coefficients + q_row * TOP_K + j, exists, 0.0)
            lists = index[None, :] == subkey[:, None]
            matrix += tl.where(lists, coefficient[None, :], 0.0)
            if BASE:
                base_coefficient = tl.load(base_coefficients + q_row * TOP_K + j, exists, 0.0)
                base_matrix += tl.where(lists, base_coefficient[None, :], 0.0)
        total += tl.sum(matrix, axis=1)
        if BASE:
            base_total += tl.sum(base_matrix, axis=1)
        pulled = tl.dot(matrix, q_tile, pulled, input_precision="tf32x3", out_dtype=dtype)

    part = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    row = part * SUBKEYS + subkey
    real = subkey < SUBKEYS
    tl.store(pulls + row[:, None] * HALF + d[None, :], pulled, real[:, None] & (d < HALF)[None, :])
    if block_d == 0:
        tl.store(sums + row, total, real)
        if BASE:
            tl.store(base_sums + row, base_total, real)


@triton.jit(do_not_specialize=["n_key_rows"])
def move_keys_kernel(
    base,  # (M,H,2,n,K/2)
    keys,  # (M,H,2,n,K/2), IDW only
    pulls,  # (P,M,H,2,n,K/2)
    sums,  # (P,M,H,2,n), IDW only
    base_sums,  # (P,M,H,2,n), BASE only
    moved,  # out (M,H,2,n,K/2)
    n_key_rows,
    HALF: tl.constexpr,
    IDW: tl.constexpr,
    BASE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    real = row < n_key_rows
    entry = row[:, None] * HALF + d[None, :]
    inside = real[:, None] & (d < HALF)[None, :]
    dtype = base.dtype.element_ty
    pulled = tl.zeros((BLOCK_N, BLOCK_D), dtype=dtype)
    total = tl.zeros((BLOCK_N,), dtype=dtype)
    base_total = tl.zeros((BLOCK_N,), dtype=dtype)
    for part in range(PARTS):
        part_row = row + part * n_key_rows
        pulled += tl.load(pulls + part_row[:, None] * HALF + d[None, :], inside, 0.0)
        if IDW:
            total += tl.load(sums + part_row, real, 0.0)
        if BASE:
            base_total += tl.load(base_sums + part_row, real, 0.0)
    result = tl.load(base + entry, inside, 0.0)
    if IDW:
        key = tl.load(keys + entry, inside, 0.0)
        result = result + base_total[:, None] * result + (total[:, None] * key - pulled)
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
    coefficients: Tensor,
    pulls: KeyPulls,
    moved: Tensor,
    chunk: Chunk,
    score: str,
    lr: float,
    address_weight: float,
) -> None:
    """moved = keys - lr * dA/dkeys, A = w * sum_i Pbar_i log(Pbar_i + 1e-8) per half; ``moved`` may be ``keys``.

    With the coefficient x_ti of each listed sub-key, idw: moved_i = key_i (1 + sum_t x_ti) - sum_t x_ti q_t, dot:
    key_i + sum_t x_ti q_t. ``coefficients`` (M,R,T,H,2,k) and ``pulls`` are scratch.
    """
    n_heads, n_subkeys, top_k = keys.shape[1], keys.shape[3], indices.shape[-1]
    block_k = triton.next_power_of_2(top_k)
    block_s = max(1, 256 // block_k)
    launch(
        entropy_coefficients_kernel,
        (triton.cdiv(chunk.n_queries * 2 * n_heads, block_s), chunk.n_memories),
        *(indices, measures, probabilities, mean, coefficients),
        *(float(lr), address_weight / (chunk.n_queries * n_heads), *chunk.sizes),
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        TOP_K=top_k,
        IDW=score == "idw",
        IDW_EPS=IDW_EPS,
        ENTROPY_EPS=ENTROPY_EPS,
        BLOCK_S=block_s,
        BLOCK_K=block_k,
        num_warps=2,
    )
    _move(q, keys, keys, indices, coefficients, None, pulls, moved, chunk, score)


def key_step_backward(
    q: Tensor,
    keys: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    base_coefficients: Tensor,
    pulls: KeyPulls,
    moved_gradient: Tensor,
    gradient: Tensor,
    chunk: Chunk,
    score: str,
) -> None:
    """gradient (M,H,2,n,K/2) of the keys before the chunk, from that of the keys after it.

    With x and y of :func:`mixers.kernels.key_backward.key_gradients`, idw: gradient_i = moved_i (1 + sum_t y_ti) +
    key_i sum_t x_ti - sum_t x_ti q_t; dot: moved_i + sum_t x_ti q_t. ``gradient`` may be ``moved_gradient``.
    """
    base = base_coefficients if score == "idw" else None
    _move(q, moved_gradient, keys, indices, coefficients, base, pulls, gradient, chunk, score)


def _move(q, base, keys, indices, coefficients, base_coefficients, pulls, moved, chunk, score) -> None:
    """moved = base (1 + sum_t y_ti) + key_i sum_t x_ti - sum_t x_ti q_t, or base + sum_t x_ti q_t, in two kernels.

    The sparse (n,S) matrix of coefficients is made tile by tile and multiplied densely (three tf32 products): its time
    does not depend on how the queries spread over the sub-keys. P splits of them are summed apart, then in order.

    Bytes: q of the chunk once per BLOCK_N sub-keys (from the L2 cache), P (n,K) sums out and in (L2), keys in and out.
    2 M S H n K operations, three times over on tensor cores; M S H 2 n k K / (2 BLOCK_D) comparisons.
    """
    n_memories, n_heads, _, n_subkeys, half_dim = keys.shape
    parts = n_splits(chunk.n_queries)
    tile_s, tile_n, tile_d, num_warps = pull_tile(n_subkeys, half_dim)
    has_base = base_coefficients is not None
    n_key_rows = n_memories * n_heads * 2 * n_subkeys
    launch(
        pull_queries_kernel,
        (triton.cdiv(n_subkeys, tile_n) * triton.cdiv(half_dim, tile_d), parts, n_memories * n_heads * 2),
        *(q, indices, coefficients, base_coefficients if has_base else coefficients, pulls.pulls, *pulls.sums),
        *chunk.sizes,
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        HALF=half_dim,
        TOP_K=indices.shape[-1],
        BASE=has_base,
        TILES=triton.cdiv(chunk.n_queries, parts * tile_s),
        BLOCK_S=tile_s,
        BLOCK_N=tile_n,
        BLOCK_D=tile_d,
        num_warps=num_warps,
    )
    block_d = triton.next_power_of_2(half_dim)
    block_n = max(1, 512 // block_d)
    launch(
        move_keys_kernel,
        (triton.cdiv(n_key_rows, block_n),),
        *(base, keys, pulls.pulls, *pulls.sums, moved, n_key_rows),
        HALF=half_dim,
        IDW=score == "idw",
        BASE=has_base,
        PARTS=parts,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=4,
    )


def pull_tile(n_subkeys: int, half_dim: int) -> tuple[int, int, int, int]:
    """Queries, sub-keys and width of a tile, and its warps."""
    tile_n = max(16, min(64, triton.next_power_of_2(n_subkeys)))
    return 32, tile_n, max(16, min(128, triton.next_power_of_2(half_dim))), 4
