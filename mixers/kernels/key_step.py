"""Move sub-keys by the coefficients of the queries that list them: the addressing step, and its backward."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from mixers.kernels.parts import part_width, products, unit_of, write_parts

ENTROPY_EPS = 1e-8


@triton.jit
def entropy_slope(share, mean, weight, n_shares, listed, EPS: tl.constexpr):
    """d A / d half score of the listed sub-keys: softmax backward of w/(S*H) (log(Pbar + eps) + Pbar / (Pbar + eps)).

    share, mean and listed are (rows,k), n_shares is S*H. Returns the slope before and after the softmax's backward.
    """
    slope = tl.where(listed, weight * (tl.log(mean + EPS) + mean / (mean + EPS)) / n_shares, 0.0)
    return slope, share * (slope - tl.sum(share * slope, axis=1)[:, None])


@triton.jit
def step_coefficients(
    q_row, listed, half, indices, measures, probabilities, uses, use_scale, lr, address_weight, n_shares,
    SUBKEYS: tl.constexpr, TOP_K: tl.constexpr, IDW: tl.constexpr, IDW_EPS: tl.constexpr, ENTROPY_EPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x_ti of :func:`move_subkeys` for half queries ``q_row`` (rows,) and the sub-keys that they list, (rows, k).

    ``half``: memory*2 + half, one for all or (rows,1). ``uses``, ``use_scale``: as from
    :func:`mixers.kernels.address.address_rows`.
    """
    entry = q_row[:, None] * TOP_K + tl.arange(0, BLOCK_K)[None, :]
    index = tl.load(indices + entry, listed, 0)
    share = tl.load(probabilities + entry, listed, 0.0)
    mean = tl.load(uses + half * SUBKEYS + index, listed, 0).to(share.dtype) * (1.0 / use_scale) / n_shares
    _, on_score = entropy_slope(share, mean, address_weight, n_shares, listed, ENTROPY_EPS)
    if IDW:
        return index, on_score * (2 * lr) / (IDW_EPS + tl.load(measures + entry, listed, 0.0))
    else:
        return index, on_score * -lr


@triton.jit
def pull_tile(
    tile, room, index_room, q_parts, q_units, indices, measures, probabilities, uses, use_scale, coefficients,
    pulls, totals, lr, address_weight, n_shares, n_memories, n_queries, n_most, n_most_each,
    n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    TOP_K: tl.constexpr, IDW: tl.constexpr, ENTROPY: tl.constexpr, IDW_EPS: tl.constexpr, ENTROPY_EPS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One of the :func:`n_pull_tiles` tiles of X^T q, with x_ti the coefficient of query t on sub-key i, or 0.

    For BLOCK_U sub-keys of one table, BLOCK_D elements and one of SPLITS parts of the chunk's queries: pulls
    (SPLITS,M,H,2,n,K/2) = sum_t x_ti q_t and totals (SPLITS,M,H,2,n) = sum_t x_ti, the latter for ``idw`` only. x are
    :func:`step_coefficients` (ENTROPY) or ``coefficients`` (M,R,T,H,2,k). A product of matrices, though all but k of n
    x_ti are 0: it takes as long however few sub-keys the queries agree on. ``room`` and ``index_room`` (k,n_most_each):
    this program's own. q from the parts of the chunk's rows; x is split into such parts here.

    Bytes per chunk: S H K of q once per BLOCK_U sub-keys (from the L2 cache), SPLITS M H n K elements out. 2 M S H n K
    operations, three times over on tensor cores.
    """
    d_tiles: tl.constexpr = (HALF + BLOCK_D - 1) // BLOCK_D
    u_tiles: tl.constexpr = (SUBKEYS + BLOCK_U - 1) // BLOCK_U
    split = tile % SPLITS
    d = tile // SPLITS % d_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    subkey = tile // (SPLITS * d_tiles) % u_tiles * BLOCK_U + tl.arange(0, BLOCK_U)
    table = tile // (SPLITS * d_tiles * u_tiles)
    half_head = table % (2 * HEADS)
    memory = table // (2 * HEADS)
    n_each = tl.cdiv(tl.cdiv(n_queries, SPLITS), BLOCK_L) * BLOCK_L
    first_row = memory.to(tl.int64) * n_queries * (2 * HEADS) + half_head
    place = tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = pulls.dtype.element_ty

    # x goes to the room of this program, turned over: X is read there by columns. In units of the queries' parts the
    # largest becomes the unit of X.
    largest = tl.zeros((BLOCK_C,), dtype=dtype)
    for done in range(0, n_each, BLOCK_C):
        of_split = done + tl.arange(0, BLOCK_C)
        query = split * n_each + of_split
        exists = (query < n_queries) & (of_split < n_each)
        listed = exists[:, None] & (place < TOP_K)[None, :]
        token = (memory.to(tl.int64) * n_rows + query // n_chunk) * n_tokens + start + query % n_chunk
        q_row = token * (2 * HEADS) + half_head
        if ENTROPY:
            index, coefficient = step_coefficients(
                q_row, listed, memory * 2 + half_head % 2, indices, measures, probabilities, uses, use_scale, lr,
                address_weight, n_shares, SUBKEYS, TOP_K, IDW, IDW_EPS, ENTROPY_EPS, BLOCK_K,
            )  # fmt: skip
        else:
            entry = q_row[:, None] * TOP_K + place[None, :]
            index = tl.load(indices + entry, listed, 0)
            coefficient = tl.load(coefficients + entry, listed, 0.0)
        in_units = coefficient * tl.load(q_units + first_row + query * (2 * HEADS), exists, 0.0)[:, None]
        largest = tl.maximum(largest, tl.max(tl.abs(in_units), axis=1))
        at = place[None, :] * n_most_each + of_split[:, None]
        kept = (of_split < n_each)[:, None] & (place < TOP_K)[None, :]
        tl.store(room + at, coefficient, kept)
        tl.store(index_room + at, index, kept)
    unit, inverse = unit_of(tl.max(largest, axis=0, keep_dims=True))
    tl.debug_barrier()

    low_parts = q_parts + n_most.to(tl.int64) * WIDTH
    inside = (d < WIDTH)[None, :]
    pull = tl.zeros((BLOCK_U, BLOCK_D), dtype=dtype)
    total = tl.zeros((BLOCK_U, BLOCK_L), dtype=dtype)
    for done in tl.range(0, n_each, BLOCK_L, num_stages=STAGES):
        of_split = done + tl.arange(0, BLOCK_L)
        query = split * n_each + of_split
        exists = query < n_queries
        row = first_row + query * (2 * HEADS)
        at = row[:, None] * WIDTH + d[None, :]
        q_high = tl.load(q_parts + at, exists[:, None] & inside, 0.0)
        q_low = q_high
        if PARTS == 2:
            q_low = tl.load(low_parts + at, exists[:, None] & inside, 0.0)
        of_room = place[:, None] * n_most_each + of_split[None, :]
        there = tl.broadcast_to((place < TOP_K)[:, None], of_room.shape)
        index = tl.load(index_room + of_room, there, -1)
        coefficient = tl.load(room + of_room, there, 0.0)
        is_here = index[:, None, :] == subkey[None, :, None]
        x = tl.sum(tl.where(is_here, coefficient[:, None, :], 0.0), axis=0)
        if IDW:
            total += x
        x = x * (tl.load(q_units + row, exists, 0.0) * inverse)[None, :]
        high = x.to(q_parts.dtype.element_ty)
        low = (x - high.to(dtype)).to(q_parts.dtype.element_ty)
        pull = products(high, low, q_high, q_low, pull, PARTS)
    tl.debug_barrier()
    key_row = table.to(tl.int64) * SUBKEYS + subkey
    out = split * n_memories.to(tl.int64) * (2 * HEADS * SUBKEYS) + key_row
    real = subkey < SUBKEYS
    tl.store(pulls + out[:, None] * HALF + d[None, :], pull * unit[None, :], real[:, None] & (d < HALF)[None, :])
    if IDW:
        tl.store(totals + out, tl.sum(total, axis=1), real & (tile // SPLITS % d_tiles == 0))


@triton.jit
def n_pull_tiles(
    n_memories, HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tiles of BLOCK_U sub-keys, BLOCK_D elements and a SPLITS-th of the queries of all tables."""
    per_table: tl.constexpr = ((SUBKEYS + BLOCK_U - 1) // BLOCK_U) * ((HALF + BLOCK_D - 1) // BLOCK_D) * SPLITS
    return n_memories * (2 * HEADS) * per_table


@triton.jit
def pulled_rows(
    row, pulls, totals, n_key_rows,
    HALF: tl.constexpr, IDW: tl.constexpr, SPLITS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of neighbouring sub-keys ``row``: the sums of :func:`pull_tile` over all queries, (rows, BLOCK_D) and (rows,)."""
    d = tl.arange(0, BLOCK_D)
    pulled = tl.zeros((row.shape[0], BLOCK_D), dtype=pulls.dtype.element_ty)
    total = tl.zeros((row.shape[0],), dtype=pulls.dtype.element_ty)
    # By part, then sub-key: a thread holds what it adds up.
    ROWS: tl.constexpr = row.shape[0]
    flat = tl.arange(0, BLOCK_E * ROWS)
    flat_row = tl.min(row, axis=0) + flat % ROWS
    for first in tl.static_range(0, SPLITS, BLOCK_E):
        split = first + flat // ROWS
        at = split.to(tl.int64) * n_key_rows + flat_row
        there = (flat_row < n_key_rows) & (split < SPLITS)
        inside = there[:, None] & (d < HALF)[None, :]
        tile = tl.load(pulls + at[:, None] * HALF + d[None, :], inside, 0.0)
        pulled += tl.sum(tl.reshape(tile, (BLOCK_E, ROWS, BLOCK_D)), axis=0)
        if IDW:
            total += tl.sum(tl.reshape(tl.load(totals + at, there, 0.0), (BLOCK_E, ROWS)), axis=0)
    return pulled, total


@triton.jit
def move_subkeys(
    row, key, pulled, total, moved, kept_totals, uses, use_scale, mean, parts, units, squares, n_shares, n_memories,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    IDW: tl.constexpr, KEEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """moved (M,H,2,n,K/2) of sub-keys ``row``, now ``key``, their parts and, for ``idw``, squares: the addressing step.

    moved = keys - lr * dA/dkeys, A = w * sum_i Pbar_i log(Pbar_i + 1e-8) per half, w = ``address_weight``, S*H =
    ``n_shares``. With the coefficients x of :func:`step_coefficients`, ``total`` = sum_t x_ti and ``pulled`` = sum_t
    x_ti q_t; idw: moved_i = key_i (1 + total_i) - pulled_i; dot: key_i + pulled_i. ``mean`` (M,2,n) receives Pbar, and
    with KEEP ``kept_totals`` (M,H,2,n) ``total``. ``key`` may come from ``moved``. Bytes per chunk: the sums, keys in
    and out twice (all from the L2 cache).
    """
    n_key_rows = n_memories * (2 * HEADS * SUBKEYS)
    exists = row < n_key_rows
    d = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64)[:, None] * HALF + d[None, :]
    inside = exists[:, None] & (d < HALF)[None, :]
    if IDW:
        key = key + total[:, None] * key - pulled
        if KEEP:
            tl.store(kept_totals + row, total, exists)
    else:
        key = key + pulled
    tl.store(moved + at, key, inside)
    split_keys(row, exists, key, parts, units, squares, n_key_rows, IDW, WIDTH, PARTS)
    half_head = row // SUBKEYS % (2 * HEADS)
    use = (row // (2 * HEADS * SUBKEYS) * 2 + half_head) * SUBKEYS + row % SUBKEYS
    used = tl.load(uses + use, exists & (half_head < 2), 0).to(key.dtype) / use_scale / n_shares
    tl.store(mean + use, used, exists & (half_head < 2))


@triton.jit
def split_keys(
    row, exists, key, parts, units, squares, n_key_rows, IDW: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr
):
    """Of keys (rows, columns >= WIDTH): their parts, units and, for ``idw``, |key|^2."""
    write_parts(key, row, exists, parts, units, n_key_rows, WIDTH, PARTS)
    if IDW:
        tl.store(squares + row, tl.sum(key * key, axis=1), exists)


@triton.jit
def move_derivatives(
    row, d_keys, keys, keys_before, pulls, totals, kept_totals, key_dots, chunk, n_steps, n_memories,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, IDW: tl.constexpr, STEP: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d_keys (M,H,2,n,K/2) of sub-keys ``row``, of the keys after a chunk, becomes that of the keys before, G.

    With the coefficients x of :func:`mixers.kernels.key_backward.gradient_rows`, idw: G_i = G_i (1 + Y_i) + key_i sum_t
    x_ti - sum_t x_ti q_t, where Y_i are the ``kept_totals`` of :func:`move_subkeys` if STEP and ``chunk`` <
    ``n_steps``, else 0; dot: G_i + sum_t x_ti q_t. ``key_dots`` (M,H,2,n) receives <key_i, G_i> for the chunk before,
    whose keys are ``keys_before``.
    """
    n_key_rows = n_memories * (2 * HEADS * SUBKEYS)
    exists = row < n_key_rows
    d = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64)[:, None] * HALF + d[None, :]
    inside = exists[:, None] & (d < HALF)[None, :]
    later = tl.load(d_keys + at, inside, 0.0)
    before = tl.load(keys_before + at, inside, 0.0)
    pulled, total = pulled_rows(row, pulls, totals, n_key_rows, HALF, IDW, SPLITS, BLOCK_E, BLOCK_D)
    if IDW:
        if STEP:
            stepped = exists & (row * 0 + chunk < n_steps)
            later += tl.load(kept_totals + row, stepped, 0.0)[:, None] * later
        later += total[:, None] * tl.load(keys + at, inside, 0.0) - pulled
    else:
        later += pulled
    tl.store(d_keys + at, later, inside)
    if IDW and STEP:
        tl.store(key_dots + row, tl.sum(before * later, axis=1), exists)


class StepTiles(NamedTuple):
    """Tiles of :func:`pull_tile` and of :func:`move_subkeys`.

    Parts of the queries; sub-keys, queries, queries whose coefficients are found together, elements, steps loaded
    ahead; sub-keys and parts of the queries that are added up together, elements.
    """

    splits: int
    pull_u: int
    pull_l: int
    pull_c: int
    pull_d: int
    stages: int
    move_u: int
    move_e: int
    move_d: int

    def n_each(self, n_queries: int) -> int:
        """Queries of a part at most."""
        return triton.cdiv(triton.cdiv(n_queries, self.splits), self.pull_l) * self.pull_l


def step_tiles(n_tables: int, n_subkeys: int, half_dim: int, top_k: int, n_queries: int, programs: int) -> StepTiles:
    """As many tiles as programs, where the queries reach. Wider tiles find the coefficients less often, but leave fewer
    registers and more parts of the sums."""
    pull_u, pull_l = (64, 32) if n_subkeys > 32 else (max(16, triton.next_power_of_2(n_subkeys)), 16)
    width = triton.next_power_of_2(part_width(half_dim))
    pull_d = min(width, 128)
    n_tiles = n_tables * triton.cdiv(n_subkeys, pull_u) * triton.cdiv(half_dim, pull_d)
    splits = max(1, min(programs // n_tiles, triton.cdiv(n_queries, pull_l)))
    n_each = triton.cdiv(triton.cdiv(n_queries, splits), pull_l) * pull_l
    pull_c = max(16, min(triton.next_power_of_2(n_each), 2048 // triton.next_power_of_2(top_k)))
    move_d = triton.next_power_of_2(half_dim)
    move_d = max(move_d, width)
    move_u = max(1, min(4, 2048 // move_d))
    move_e = max(1, min(triton.next_power_of_2(splits), 8192 // (move_u * move_d)))
    return StepTiles(splits, pull_u, pull_l, pull_c, pull_d, 3, move_u, move_e, move_d)
