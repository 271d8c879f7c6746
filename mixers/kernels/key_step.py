"""Move sub-keys by the coefficients of the queries that list them: the addressing step, and its backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk, token_of
from mixers.kernels.launch import launch
from mixers.kernels.use import Uses, parts_of
from mixers.product_keys import IDW_EPS

ENTROPY_EPS = 1e-8


@triton.jit
def entropy_slope(share, mean, weight, listed, EPS: tl.constexpr):
    """d A / d half score of the listed sub-keys: the softmax backward of w (log(Pbar + eps) + Pbar / (Pbar + eps)).

    share, mean and listed are (S,k), weight is w / (S*H). Returns the slope before and after the softmax's backward.
    """
    slope = tl.where(listed, weight * (tl.log(mean + EPS) + mean / (mean + EPS)), 0.0)
    return slope, share * (slope - tl.sum(share * slope, axis=1)[:, None])


@triton.jit(do_not_specialize=["n_rows", "n_chunk", "n_tokens", "start", "n_split"])
def step_keys_kernel(
    q,  # (M,R,T,H,K)
    base,  # (M,H,2,n,K/2)
    keys,  # (M,H,2,n,K/2), IDW only
    listing,  # (M,H,2,n,P,S/P) int32
    counts,  # (M,H,2,n,P) int32
    indices,  # (M,R,T,H,2,k) int32, ENTROPY only
    measures,  # (M,R,T,H,2,k), ENTROPY only
    probabilities,  # (M,R,T,H,2,k), ENTROPY only
    mean,  # (M,2,n), ENTROPY only
    coefficients,  # (M,R,T,H,2,k), if not ENTROPY
    base_coefficients,  # (M,R,T,H,2,k), BASE only
    moved,  # out (M,H,2,n,K/2)
    lr,
    slope_weight,
    n_rows,
    n_chunk,
    n_tokens,
    start,
    n_split,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    HALF: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    ENTROPY: tl.constexpr,
    BASE: tl.constexpr,
    IDW_EPS: tl.constexpr,
    ENTROPY_EPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    key_row = tl.program_id(0).to(tl.int64)
    half_head = tl.program_id(0) // SUBKEYS % (2 * HEADS)
    memory = tl.program_id(0) // (SUBKEYS * 2 * HEADS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dtype = q.dtype.element_ty
    part = tl.arange(0, BLOCK_P)
    count = tl.load(counts + key_row * PARTS + part, part < PARTS, 0)
    part_end = tl.cumsum(count, axis=0)
    part_begin = part_end - count
    n_listed = tl.sum(count, axis=0)
    place = tl.arange(0, BLOCK_K)
    pulled = tl.zeros((BLOCK_E, BLOCK_D), dtype=dtype)
    total = tl.zeros((BLOCK_E,), dtype=dtype)
    base_total = tl.zeros((BLOCK_E,), dtype=dtype)
    done = 0
    while done < n_listed:
        # The lists of all parts one after the other.
        e = done + tl.arange(0, BLOCK_E)
        listed = e < n_listed
        mine = (e[:, None] >= part_begin[None, :]) & (e[:, None] < part_end[None, :])
        position = e + tl.sum(tl.where(mine, (part * n_split - part_begin)[None, :], 0), axis=1)
        access = tl.load(listing + key_row * (PARTS * n_split) + position, listed, 0)
        token = token_of(access // TOP_K, memory, n_rows, n_chunk, n_tokens, start)
        q_row = token * (2 * HEADS) + half_head
        entry = q_row * TOP_K + access % TOP_K
        q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], listed[:, None] & (d < HALF)[None, :], 0.0)
        if ENTROPY:
            row_listed = listed[:, None] & (place < TOP_K)[None, :]
            row = (q_row * TOP_K)[:, None] + place[None, :]
            index = tl.load(indices + row, row_listed, 0)
            share = tl.load(probabilities + row, row_listed, 0.0)
            used = tl.load(mean + (memory * 2 + half_head % 2) * SUBKEYS + index, row_listed, 1.0)
            _, on_score = entropy_slope(share, used, slope_weight, row_listed, ENTROPY_EPS)
            chosen = place[None, :] == (access % TOP_K)[:, None]
            coefficient = tl.sum(tl.where(chosen, on_score, 0.0), axis=1)
            if IDW:
                coefficient = coefficient * (2 * lr) / (IDW_EPS + tl.load(measures + entry, listed, 0.0))
            else:
                coefficient = coefficient * -lr
        else:
            coefficient = tl.load(coefficients + entry, listed, 0.0)
        pulled += coefficient[:, None] * q_tile
        total += coefficient
        if BASE:
            base_total += tl.load(base_coefficients + entry, listed, 0.0)
        done += BLOCK_E

    entry = key_row * HALF + d
    result = tl.load(base + entry, d < HALF, 0.0)
    pull = tl.sum(pulled, axis=0)
    if IDW:
        key = tl.load(keys + entry, d < HALF, 0.0)
        if BASE:
            result += tl.sum(base_total, axis=0) * result
        result += tl.sum(total, axis=0) * key - pull
    else:
        result += pull
    tl.store(moved + entry, result, d < HALF)


def descend_entropy(
    q: Tensor,
    keys: Tensor,
    indices: Tensor,
    measures: Tensor,
    probabilities: Tensor,
    mean: Tensor,
    found: Uses,
    moved: Tensor,
    chunk: Chunk,
    score: str,
    lr: float,
    address_weight: float,
) -> None:
    """moved = keys - lr * dA/dkeys, A = w * sum_i Pbar_i log(Pbar_i + 1e-8) per half; ``moved`` may be ``keys``.

    With the coefficient x_ti of each listed sub-key, idw: moved_i = key_i (1 + sum_t x_ti) - sum_t x_ti q_t, dot:
    key_i + sum_t x_ti q_t. ``found`` and ``mean`` (M,2,n): of the chunk, from :func:`mixers.kernels.use.mean_use`.
    """
    slope_weight = address_weight / (chunk.n_queries * keys.shape[1])
    nothing = probabilities
    _launch(
        q, keys, keys, found, indices, measures, probabilities, mean, nothing, None, moved, lr, slope_weight, chunk,
        score, entropy=True,
    )  # fmt: skip


def key_step_backward(
    q: Tensor,
    keys: Tensor,
    coefficients: Tensor,
    base_coefficients: Tensor,
    found: Uses,
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
    nothing = coefficients
    _launch(
        q, moved_gradient, keys, found, found.counts, nothing, nothing, nothing, coefficients, base, gradient, 0.0, 0.0,
        chunk, score, entropy=False,
    )  # fmt: skip


def _launch(
    q, base, keys, found, indices, measures, probabilities, mean, coefficients, base_coefficients, moved, lr,
    slope_weight, chunk, score, *, entropy,
) -> None:  # fmt: skip
    """moved = base (1 + sum_t y_ti) + key_i sum_t x_ti - sum_t x_ti q_t, or base + sum_t x_ti q_t.

    One program sums a sub-key over the queries that list it, BLOCK_E at a time and in their order: a sub-key listed by
    all queries of a chunk takes S / BLOCK_E steps in a row.

    Bytes: S H k K elements of q (from the L2 cache), keys in and out.
    """
    n_memories, n_heads, _, n_subkeys, half_dim = keys.shape
    n_parts, n_split = parts_of(chunk.n_queries)
    block_d = min(512, triton.next_power_of_2(half_dim))
    has_base = base_coefficients is not None
    top_k = coefficients.shape[-1]
    launch(
        step_keys_kernel,
        (n_memories * n_heads * 2 * n_subkeys, triton.cdiv(half_dim, block_d)),
        *(q, base, keys, found.listing, found.counts, indices, measures, probabilities, mean, coefficients),
        *(base_coefficients if has_base else coefficients, moved, float(lr), slope_weight, *chunk.sizes, n_split),
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        HALF=half_dim,
        TOP_K=top_k,
        IDW=score == "idw",
        ENTROPY=entropy,
        BASE=has_base,
        IDW_EPS=IDW_EPS,
        ENTROPY_EPS=ENTROPY_EPS,
        PARTS=n_parts,
        BLOCK_P=triton.next_power_of_2(n_parts),
        BLOCK_E=min(32, 4096 // block_d),
        BLOCK_D=block_d,
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=4,
    )
