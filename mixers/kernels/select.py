"""Ranks of all sub-keys for each half of each query, and the k best of them."""

from __future__ import annotations

import triton
import triton.language as tl

from mixers.kernels.parts import part_width, products


@triton.jit
def rank_tile(
    tile, q_parts, q_units, key_parts, key_units, key_squares, ranks, n_memories, n_queries, n_most,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, WIDTH: tl.constexpr, IDW: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write one of the :func:`n_rank_tiles` tiles of a chunk's ``ranks`` (M,S,H,2,n): the higher, the nearer.

    ``idw``: 2<q,key> - |key|^2, ``dot``: <q,key>, from the rows' parts (:mod:`mixers.kernels.parts`), accurate to about
    2^-21 of |q| |key|.

    Bytes per chunk: M S H 2 n ranks out; q once per BLOCK_N sub-keys and the keys once per BLOCK_S queries (from the
    L2 cache). 2 M S H n K operations, three times over on tensor cores.
    """
    key_tiles: tl.constexpr = (SUBKEYS + BLOCK_N - 1) // BLOCK_N
    query_tiles = tl.cdiv(n_queries, BLOCK_S)
    table = tile // (key_tiles * query_tiles)
    half_head = table % (2 * HEADS)
    memory = table // (2 * HEADS)
    query = tile // key_tiles % query_tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = query < n_queries
    row = (memory.to(tl.int64) * n_queries + query) * (2 * HEADS) + half_head
    subkey = tile % key_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    real = subkey < SUBKEYS
    key_row = table.to(tl.int64) * SUBKEYS + subkey
    q_low_parts = q_parts + n_most.to(tl.int64) * WIDTH
    key_low_parts = key_parts + n_memories.to(tl.int64) * (2 * HEADS * SUBKEYS * WIDTH)

    rank = tl.zeros((BLOCK_S, BLOCK_N), dtype=ranks.dtype.element_ty)
    for first in tl.range(0, WIDTH, BLOCK_D, num_stages=STAGES):
        d = first + tl.arange(0, BLOCK_D)
        at_q = row[:, None] * WIDTH + d[None, :]
        at_key = key_row[:, None] * WIDTH + d[None, :]
        q_high = tl.load(q_parts + at_q, exists[:, None], 0.0)
        key_high = tl.load(key_parts + at_key, real[:, None], 0.0)
        q_low, key_low = q_high, key_high
        if PARTS == 2:
            q_low = tl.load(q_low_parts + at_q, exists[:, None], 0.0)
            key_low = tl.load(key_low_parts + at_key, real[:, None], 0.0)
        rank = products(q_high, q_low, tl.trans(key_high), tl.trans(key_low), rank, PARTS)
    rank = rank * tl.load(q_units + row, exists, 0.0)[:, None] * tl.load(key_units + key_row, real, 0.0)[None, :]
    # |q|^2 is the same for all sub-keys of a query: it does not change the order.
    if IDW:
        rank = 2 * rank - tl.load(key_squares + key_row, real, 0.0)[None, :]
    tl.store(ranks + row[:, None] * SUBKEYS + subkey[None, :], rank, exists[:, None] & real[None, :])


@triton.jit
def n_rank_tiles(
    n_memories, n_queries, HEADS: tl.constexpr, SUBKEYS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Tiles of BLOCK_S queries and BLOCK_N sub-keys of all memories, heads and halves."""
    return n_memories * (2 * HEADS) * tl.cdiv(n_queries, BLOCK_S) * ((SUBKEYS + BLOCK_N - 1) // BLOCK_N)


def rank_tile_sizes(
    n_tables: int, n_queries: int, n_subkeys: int, half_dim: int, programs: int, shared_bytes: int
) -> tuple[int, int, int, int]:
    """Queries, sub-keys and elements of a tile, and how many steps a program loads ahead: up to 3, as far as its shared
    memory reaches, 8 KB of which other work takes. ``n_queries`` of a chunk in each of ``n_tables``."""
    block_s, block_n = (64, 64) if n_subkeys > 32 else (32, max(16, triton.next_power_of_2(n_subkeys)))
    if block_n == 64 and n_tables * triton.cdiv(n_queries, block_s) * triton.cdiv(n_subkeys, block_n) < programs:
        # Else some programs have none.
        block_n = 32
    block_d = 64 if part_width(half_dim) % 64 == 0 else 32
    n_steps = (shared_bytes - 8192) // (2 * 2 * (block_s + block_n) * block_d)
    return block_s, block_n, block_d, max(1, min(3, n_steps))


@triton.jit
def in_order(x):
    """Integers that compare as the floats x do, -0 as 0 and NaN as the largest."""
    x = tl.where(x == x, x, float("inf")) + 0.0
    if x.dtype.primitive_bitwidth == 64:
        bits = x.to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order(order):
    """The floats of :func:`in_order`."""
    if order.dtype.primitive_bitwidth == 64:
        return (order ^ ((order >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def without(order, gone):
    """``order``, integers of :func:`in_order`, where ``gone`` below all that a float can be."""
    if order.dtype.primitive_bitwidth == 64:
        return tl.where(gone, -0x7FFFFFFFFFFFFFFF, order)
    else:
        return tl.where(gone, -0x7FFFFFFF, order)


@triton.jit
def choose_best(order, real, COUNT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns (rows, BLOCK_K) of the COUNT largest ``order`` of each row, best first; equal ones: the lowest column.

    ``order`` (rows, columns): of :func:`in_order`; ``real`` (columns,). Two maxima of integers for each column found,
    which a warp does in one instruction each.
    """
    columns: tl.constexpr = order.shape[1]
    column = tl.arange(0, columns)
    place = tl.arange(0, BLOCK_K)
    order = without(order, tl.broadcast_to((real == 0)[None, :], order.shape))
    best = tl.zeros((order.shape[0], BLOCK_K), dtype=tl.int32)
    for j in range(COUNT):
        highest = tl.max(order, axis=1)
        top = tl.min(tl.where(order == highest[:, None], column[None, :], columns - 1), axis=1)
        best = tl.where(place[None, :] == j, top[:, None], best)
        order = without(order, column[None, :] == top[:, None])
    return best


@triton.jit
def order_of_part(x, row, exists, part, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """:func:`in_order` of columns part * WIDTH and on of the given rows of x (., COLUMNS)."""
    column = part * WIDTH + tl.arange(0, WIDTH)
    real = column < COLUMNS
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    order = in_order(tl.load(x + at, exists[:, None] & real[None, :], 0.0))
    return without(order, tl.broadcast_to((real == 0)[None, :], order.shape))


@triton.jit
def order_in_parts(x, row, exists, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Rows of x (., COLUMNS) as integers of :func:`in_order`, (rows, WIDTH, PARTS): [r,i,p] is column p * WIDTH + i.

    Put together of one tile for each part, so that a thread holds its columns of all parts, and a warp whole rows:
    loaded as one tile, they lie so with some versions of the compiler only.
    """
    order = order_of_part(x, row, exists, 0, COLUMNS, WIDTH)
    if PARTS >= 2:
        # Of tensors joined twice the last axis is that of the outer join.
        order = tl.join(order, order_of_part(x, row, exists, PARTS // 2, COLUMNS, WIDTH))
    if PARTS >= 4:
        first = order_of_part(x, row, exists, PARTS // 4, COLUMNS, WIDTH)
        order = tl.join(order, tl.join(first, order_of_part(x, row, exists, 3 * PARTS // 4, COLUMNS, WIDTH)))
    if PARTS >= 8:
        first = order_of_part(x, row, exists, 1, COLUMNS, WIDTH)
        first = tl.join(first, order_of_part(x, row, exists, 5, COLUMNS, WIDTH))
        other = order_of_part(x, row, exists, 3, COLUMNS, WIDTH)
        other = tl.join(other, order_of_part(x, row, exists, 7, COLUMNS, WIDTH))
        order = tl.join(order, tl.join(first, other))
    return tl.reshape(order, (row.shape[0], WIDTH, PARTS))


@triton.jit
def choose_best_of_parts(order, column, COUNT: tl.constexpr):
    """As :func:`choose_best`, of rows from :func:`order_in_parts`: the largest and where they are.

    No maximum waits for another warp. ``column`` (columns of a part, parts): their numbers. Both results (rows, 32), a
    column a thread, of which the first COUNT count.
    """
    place = tl.arange(0, 32)
    found = tl.zeros((order.shape[0], 32), dtype=order.dtype)
    best = tl.zeros((order.shape[0], 32), dtype=tl.int32)
    for j in range(COUNT):
        highest = tl.max(tl.max(order, axis=2), axis=1)
        is_top = order == highest[:, None, None]
        top = tl.min(tl.min(tl.where(is_top, column[None, :, :], 0x7FFFFFFF), axis=2), axis=1)
        found = tl.where(place[None, :] == j, highest[:, None], found)
        best = tl.where(place[None, :] == j, top[:, None], best)
        order = without(order, column[None, :, :] == top[:, None, None])
    return found, best
