"""Move sub-keys by the coefficients of the queries that list them: the addressing step, and its backward."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

ENTROPY_EPS = 1e-8


@triton.jit
def entropy_slope(share, mean, weight, n_shares, listed, EPS: tl.constexpr):
    """d A / d half score of the listed sub-keys: softmax backward of w/(S*H) (log(Pbar + eps) + Pbar / (Pbar + eps)).

    share, mean and listed are (rows,k), n_shares is S*H. Returns the slope before and after the softmax's backward.
    """
    slope = tl.where(listed, weight * (tl.log(mean + EPS) + mean / (mean + EPS)) / n_shares, 0.0)
    return slope, share * (slope - tl.sum(share * slope, axis=1)[:, None])


@triton.jit
def table_lane(n_tables):
    """Which table this program works on first, the program's place among those of the table, and how many these are.

    Tables are dealt out to the programs; if there are more, a program takes every (number of programs)-th.
    """
    program = tl.program_id(0)
    table = program % n_tables
    return table, program // n_tables, tl.maximum((tl.num_programs(0) - table + n_tables - 1) // n_tables, 1)


@triton.jit
def n_pieces(count, BLOCK_L: tl.constexpr):
    """Pieces of at most BLOCK_L accesses that a list is cut into; an empty list is one piece."""
    return tl.maximum((count + BLOCK_L - 1) // BLOCK_L, 1)


@triton.jit
def pull_pieces(
    table, lane, n_lanes, q, listing, counts, indices, measures, probabilities, mean, coefficients, base_coefficients,
    pulls, totals, base_totals, lr, address_weight, n_shares, n_most, n_most_pieces, n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, TOP_K: tl.constexpr,
    IDW: tl.constexpr, ENTROPY: tl.constexpr, BASE: tl.constexpr, IDW_EPS: tl.constexpr, ENTROPY_EPS: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over pieces of the lists of queries (:func:`mixers.kernels.use.list_uses`) of one table's sub-keys.

    A list has up to S queries, most have few: each is cut into :func:`n_pieces`, so that programs have as much to do.
    For a piece: pulls (M,H,2,n_most_pieces,K/2) = sum_t x_ti q_t, totals = sum_t x_ti, with BASE base_totals =
    sum_t y_ti. See :func:`step_subkeys` for x and y. Of ``n_lanes`` programs this one, ``lane``, does every n_lanes-th
    BLOCK_U pieces.

    Bytes per chunk: S H k K elements of q (from the L2 cache).
    """
    half_head = table % (2 * HEADS)
    memory = table // (2 * HEADS)
    subkey = tl.arange(0, BLOCK_N)
    first_list = table * SUBKEYS
    count = tl.load(counts + first_list + subkey, subkey < SUBKEYS, 0)
    pieces = tl.where(subkey < SUBKEYS, n_pieces(count, BLOCK_L), 0)
    ends = tl.cumsum(pieces, axis=0)
    n_all = tl.sum(pieces, axis=0)
    place = tl.arange(0, BLOCK_K)
    flat = tl.arange(0, BLOCK_U * BLOCK_L)
    for tile in range(lane, tl.cdiv(n_all, BLOCK_U), n_lanes):
        piece = tile * BLOCK_U + tl.arange(0, BLOCK_U)
        before = ends[None, :] <= piece[:, None]
        mine = tl.sum(before.to(tl.int32), axis=1)
        part = piece - tl.sum(tl.where(before, pieces[None, :], 0), axis=1)
        here = tl.sum(tl.where(subkey[None, :] == mine[:, None], count[None, :], 0), axis=1)
        # One row of the tile for each access.
        list_row = first_list + spread(tl.minimum(mine, SUBKEYS - 1), BLOCK_L)
        position = spread(part * BLOCK_L, BLOCK_L) + flat % BLOCK_L
        listed = position < spread(here, BLOCK_L)
        access = tl.load(listing + list_row * n_most + position, listed, 0)
        query = access // TOP_K
        token = (memory * n_rows + query // n_chunk) * n_tokens + start + query % n_chunk
        q_row = (token * (2 * HEADS) + half_head).to(tl.int64)
        entry = q_row * TOP_K + access % TOP_K
        if ENTROPY:
            row_listed = listed[:, None] & (place < TOP_K)[None, :]
            of_query = (q_row * TOP_K)[:, None] + place[None, :]
            index = tl.load(indices + of_query, row_listed, 0)
            share = tl.load(probabilities + of_query, row_listed, 0.0)
            used = tl.load(mean + (memory * 2 + half_head % 2) * SUBKEYS + index, row_listed, 1.0)
            _, on_score = entropy_slope(share, used, address_weight, n_shares, row_listed, ENTROPY_EPS)
            chosen = place[None, :] == (access % TOP_K)[:, None]
            coefficient = tl.sum(tl.where(chosen, on_score, 0.0), axis=1)
            if IDW:
                coefficient = coefficient * (2 * lr) / (IDW_EPS + tl.load(measures + entry, listed, 0.0))
            else:
                coefficient = coefficient * -lr
        else:
            coefficient = tl.load(coefficients + entry, listed, 0.0)
        exists = piece < n_all
        out = (table * n_most_pieces + piece).to(tl.int64)
        tl.store(totals + out, tl.sum(tl.reshape(coefficient, (BLOCK_U, BLOCK_L)), axis=1), exists)
        if BASE:
            base = tl.load(base_coefficients + entry, listed, 0.0)
            tl.store(base_totals + out, tl.sum(tl.reshape(base, (BLOCK_U, BLOCK_L)), axis=1), exists)
        for first in range(0, HALF, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            inside = d < HALF
            q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], listed[:, None] & inside[None, :], 0.0)
            pull = tl.reshape(coefficient[:, None] * q_tile, (BLOCK_U, BLOCK_L, BLOCK_D))
            tl.store(pulls + out[:, None] * HALF + d[None, :], tl.sum(pull, axis=1), exists[:, None] & inside[None, :])


@triton.jit
def spread(x, TIMES: tl.constexpr):
    """Each element of x (rows,) TIMES times: (rows * TIMES,)."""
    # Not a broadcast and a reshape, after which every thread would hold all elements.
    return tl.gather(x, tl.arange(0, x.shape[0] * TIMES) // TIMES, 0)


@triton.jit
def step_subkeys(
    tile, base, keys, counts, pulls, totals, base_totals, moved, n_most_pieces, n_memories,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, IDW: tl.constexpr, BASE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """moved (M,H,2,n,K/2) of BLOCK_U sub-keys, from the sums of :func:`pull_pieces`, added in the order of the queries.

    The addressing step: moved = keys - lr * dA/dkeys, A = w * sum_i Pbar_i log(Pbar_i + 1e-8) per half, w =
    ``address_weight``, S*H = ``n_shares``. With the coefficient x_ti of each listed sub-key, idw: moved_i = key_i
    (1 + sum_t x_ti) - sum_t x_ti q_t; dot: key_i + sum_t x_ti q_t. ``mean`` (M,2,n) are the chunk's Pbar.

    Its backward, not ENTROPY: x are ``coefficients`` and y ``base_coefficients`` (M,R,T,H,2,k), given, and idw: moved_i
    = base_i (1 + sum_t y_ti) + key_i sum_t x_ti - sum_t x_ti q_t; dot: base_i + sum_t x_ti q_t.

    ``moved`` may be ``base`` or ``keys``. Bytes per chunk: the sums, keys in and out (all from the L2 cache).
    """
    row = tile * BLOCK_U + tl.arange(0, BLOCK_U)
    real = row < n_memories * (2 * HEADS) * SUBKEYS
    table = row // SUBKEYS
    subkey = tl.arange(0, BLOCK_N)
    in_table = (subkey < SUBKEYS)[None, :] & real[:, None]
    count = tl.load(counts + (table.to(tl.int64) * SUBKEYS)[:, None] + subkey[None, :], in_table, 0)
    pieces = tl.where(in_table, n_pieces(count, BLOCK_L), 0)
    before = tl.sum(tl.where(subkey[None, :] < (row % SUBKEYS)[:, None], pieces, 0), axis=1)
    mine = tl.sum(tl.where(subkey[None, :] == (row % SUBKEYS)[:, None], pieces, 0), axis=1)
    n_longest = tl.max(mine, axis=0)
    first_piece = spread(table.to(tl.int64) * n_most_pieces + before, BLOCK_E)
    n_mine = spread(mine, BLOCK_E)
    e = tl.arange(0, BLOCK_U * BLOCK_E) % BLOCK_E
    for first in range(0, HALF, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        inside = d < HALF
        pull = tl.zeros((BLOCK_U * BLOCK_E, BLOCK_D), dtype=keys.dtype.element_ty)
        total = tl.zeros((BLOCK_U * BLOCK_E,), dtype=keys.dtype.element_ty)
        base_total = tl.zeros((BLOCK_U * BLOCK_E,), dtype=keys.dtype.element_ty)
        for done in range(0, n_longest, BLOCK_E):
            piece = first_piece + done + e
            listed = done + e < n_mine
            pull += tl.load(pulls + piece[:, None] * HALF + d[None, :], listed[:, None] & inside[None, :], 0.0)
            total += tl.load(totals + piece, listed, 0.0)
            if BASE:
                base_total += tl.load(base_totals + piece, listed, 0.0)
        at = row.to(tl.int64)[:, None] * HALF + d[None, :]
        exists = real[:, None] & inside[None, :]
        result = tl.load(base + at, exists, 0.0)
        pulled = tl.sum(tl.reshape(pull, (BLOCK_U, BLOCK_E, BLOCK_D)), axis=1)
        if IDW:
            key = tl.load(keys + at, exists, 0.0)
            if BASE:
                result += tl.sum(tl.reshape(base_total, (BLOCK_U, BLOCK_E)), axis=1)[:, None] * result
            result += tl.sum(tl.reshape(total, (BLOCK_U, BLOCK_E)), axis=1)[:, None] * key - pulled
        else:
            result += pulled
        tl.store(moved + at, result, exists)


class StepTiles(NamedTuple):
    """Tiles of :func:`pull_pieces` (pieces, accesses, elements) and of :func:`step_subkeys` (sub-keys, pieces)."""

    pull_u: int
    pull_l: int
    width: int
    step_u: int
    step_e: int


def step_tiles(half_dim: int, n_subkeys: int) -> StepTiles:
    """At most 8192 elements of keys and 2048 sub-keys a tile, where that leaves 2 pieces and 4 sub-keys."""
    width = min(256, triton.next_power_of_2(half_dim))
    n_compared = 2048 // triton.next_power_of_2(n_subkeys)
    pull_u = max(2, min(16, 8192 // (16 * width), n_compared))
    step_u = max(4, min(32, 8192 // (8 * width), n_compared))
    return StepTiles(pull_u, 16, width, step_u, 8)


def n_most_pieces(n_queries: int, n_subkeys: int, top_k: int, tiles: StepTiles) -> int:
    """Pieces that the lists of a table's sub-keys have at most: every query lists k of them."""
    return n_subkeys + n_queries * top_k // tiles.pull_l
