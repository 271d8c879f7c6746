"""Ranks of all sub-keys for each half of each query, and the k best of them."""

from __future__ import annotations

import triton
import triton.language as tl

from mixers.kernels.chunk import token_of


@triton.jit
def rank_tile(
    tile, q, keys, ranks, n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, IDW: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write one of the :func:`n_rank_tiles` tiles of a chunk's ``ranks`` (M,S,H,2,n): the higher, the nearer.

    ``idw``: 2<q,key> - |key|^2, ``dot``: <q,key>, both from three tf32 products, accurate to about 2^-21 of |q| |key|.

    Bytes per chunk: M S H 2 n ranks out; q once per BLOCK_N sub-keys and the keys once per BLOCK_S queries (from the
    L2 cache). 2 M S H n K operations, three times over on tensor cores.
    """
    n_queries = n_rows * n_chunk
    key_tiles: tl.constexpr = (SUBKEYS + BLOCK_N - 1) // BLOCK_N
    query_tiles = tl.cdiv(n_queries, BLOCK_S)
    table = tile // (key_tiles * query_tiles)
    half_head = table % (2 * HEADS)
    memory = table // (2 * HEADS)
    query = tile // key_tiles % query_tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = query < n_queries
    q_row = token_of(query, memory, n_rows, n_chunk, n_tokens, start) * (2 * HEADS) + half_head
    subkey = tile % key_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    real = subkey < SUBKEYS
    key_row = table.to(tl.int64) * SUBKEYS + subkey
    dtype = q.dtype.element_ty

    rank = tl.zeros((BLOCK_S, BLOCK_N), dtype=dtype)
    squares = tl.zeros((BLOCK_N, BLOCK_D), dtype=dtype)
    for first in tl.range(0, HALF, BLOCK_D, num_stages=STAGES):
        d = first + tl.arange(0, BLOCK_D)
        inside = d < HALF
        q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], exists[:, None] & inside[None, :], 0.0)
        key_tile = tl.load(keys + key_row[:, None] * HALF + d[None, :], real[:, None] & inside[None, :], 0.0)
        if IDW:
            squares += key_tile * key_tile
        rank = tl.dot(q_tile, tl.trans(key_tile), rank, input_precision="tf32x3", out_dtype=dtype)
    # |q|^2 is the same for all sub-keys of a query: it does not change the order.
    if IDW:
        rank = 2 * rank - tl.sum(squares, axis=1)[None, :]
    row = (memory.to(tl.int64) * n_queries + query) * (2 * HEADS) + half_head
    tl.store(ranks + row[:, None] * SUBKEYS + subkey[None, :], rank, exists[:, None] & real[None, :])


@triton.jit
def n_rank_tiles(
    n_memories, n_queries, HEADS: tl.constexpr, SUBKEYS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Tiles of BLOCK_S queries and BLOCK_N sub-keys of all memories, heads and halves."""
    return n_memories * (2 * HEADS) * tl.cdiv(n_queries, BLOCK_S) * ((SUBKEYS + BLOCK_N - 1) // BLOCK_N)


def rank_tile_sizes(n_subkeys: int, block_d: int, shared_bytes: int) -> tuple[int, int, int]:
    """Queries and sub-keys of a tile, and how many steps of ``block_d`` elements a program loads ahead: up to 6, as far
    as its shared memory reaches, 8 KB of which other work takes."""
    block_s, block_n = (64, 64) if n_subkeys > 32 else (32, max(16, triton.next_power_of_2(n_subkeys)))
    n_steps = (shared_bytes - 8192) // (4 * (block_s + block_n) * block_d)
    return block_s, block_n, max(1, min(6, n_steps))


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
