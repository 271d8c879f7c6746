"""Move sub-keys by the coefficients of the queries that list them: the addressing step, and its backward."""

from __future__ import annotations

import triton
import triton.language as tl

from mixers.kernels.chunk import token_of

ENTROPY_EPS = 1e-8


@triton.jit
def entropy_slope(share, mean, weight, n_shares, listed, EPS: tl.constexpr):
    """d A / d half score of the listed sub-keys: softmax backward of w/(S*H) (log(Pbar + eps) + Pbar / (Pbar + eps)).

    share, mean and listed are (rows,k), n_shares is S*H. Returns the slope before and after the softmax's backward.
    """
    slope = tl.where(listed, weight * (tl.log(mean + EPS) + mean / (mean + EPS)) / n_shares, 0.0)
    return slope, share * (slope - tl.sum(share * slope, axis=1)[:, None])


@triton.jit
def step_subkeys(
    tile, q, base, keys, listing, counts, indices, measures, probabilities, mean, coefficients, base_coefficients,
    moved, lr, address_weight, n_shares, n_most, n_memories, n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, TOP_K: tl.constexpr,
    IDW: tl.constexpr, ENTROPY: tl.constexpr, BASE: tl.constexpr, IDW_EPS: tl.constexpr, ENTROPY_EPS: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """moved (M,H,2,n,K/2) of BLOCK_U sub-keys, from their lists (:func:`mixers.kernels.use.list_uses`) of queries.

    ENTROPY: moved = keys - lr * dA/dkeys, A = w * sum_i Pbar_i log(Pbar_i + 1e-8) per half, w = ``address_weight``,
    S*H = ``n_shares``. With the coefficient x_ti of each listed sub-key, idw: moved_i = key_i (1 + sum_t x_ti) -
    sum_t x_ti q_t; dot: key_i + sum_t x_ti q_t. ``mean`` (M,2,n) are the chunk's Pbar.

    Else x are ``coefficients`` and y ``base_coefficients`` (M,R,T,H,2,k), given, and idw: moved_i = base_i
    (1 + sum_t y_ti) + key_i sum_t x_ti - sum_t x_ti q_t; dot: base_i + sum_t x_ti q_t.

    ``moved`` may be ``base`` or ``keys``. Bytes per chunk: S H k K elements of q (from the L2 cache), keys in and out.
    """
    row = tile * BLOCK_U + tl.arange(0, BLOCK_U)
    real = row < n_memories * (2 * HEADS) * SUBKEYS
    n_longest = tl.max(tl.load(counts + row, real, 0), axis=0)
    dtype = q.dtype.element_ty
    # BLOCK_E accesses of each sub-key at a time, one row of the tile for each.
    place = tl.arange(0, BLOCK_K)
    flat = tl.arange(0, BLOCK_U * BLOCK_E)
    list_row = tile * BLOCK_U + flat // BLOCK_E
    list_real = list_row < n_memories * (2 * HEADS) * SUBKEYS
    half_head = list_row // SUBKEYS % (2 * HEADS)
    memory = list_row // (SUBKEYS * 2 * HEADS)
    n_listed = tl.load(counts + list_row, list_real, 0)
    for first in range(0, HALF, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        inside = d < HALF
        pulled = tl.zeros((BLOCK_U * BLOCK_E, BLOCK_D), dtype=dtype)
        total = tl.zeros((BLOCK_U * BLOCK_E,), dtype=dtype)
        base_total = tl.zeros((BLOCK_U * BLOCK_E,), dtype=dtype)
        for done in range(0, n_longest, BLOCK_E):
            position = done + flat % BLOCK_E
            listed = position < n_listed
            access = tl.load(listing + list_row.to(tl.int64) * n_most + position, listed, 0)
            token = token_of(access // TOP_K, memory, n_rows, n_chunk, n_tokens, start)
            q_row = token * (2 * HEADS) + half_head
            entry = q_row * TOP_K + access % TOP_K
            q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], listed[:, None] & inside[None, :], 0.0)
            if ENTROPY:
                row_listed = listed[:, None] & (place < TOP_K)[None, :]
                of_query = (q_row * TOP_K)[:, None] + place[None, :]
                index = tl.load(indices + of_query, row_listed, 0)
                share = tl.load(probabilities + of_query, row_listed, 0.0)
                used = tl.load(mean + ((memory * 2 + half_head % 2) * SUBKEYS)[:, None] + index, row_listed, 1.0)
                _, on_score = entropy_slope(share, used, address_weight, n_shares, row_listed, ENTROPY_EPS)
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
        pull = tl.sum(tl.reshape(pulled, (BLOCK_U, BLOCK_E, BLOCK_D)), axis=1)
        at = row.to(tl.int64)[:, None] * HALF + d[None, :]
        exists = real[:, None] & inside[None, :]
        result = tl.load(base + at, exists, 0.0)
        if IDW:
            key = tl.load(keys + at, exists, 0.0)
            if BASE:
                result += tl.sum(tl.reshape(base_total, (BLOCK_U, BLOCK_E)), axis=1)[:, None] * result
            result += tl.sum(tl.reshape(total, (BLOCK_U, BLOCK_E)), axis=1)[:, None] * key - pull
        else:
            result += pull
        tl.store(moved + at, result, exists)


def step_tile_sizes(half_dim: int) -> tuple[int, int, int]:
    """Sub-keys, accesses of each at a time, and elements of a key that a program holds."""
    block_d = min(256, triton.next_power_of_2(half_dim))
    return 4, max(4, min(16, 2048 // block_d)), block_d
