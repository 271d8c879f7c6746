"""How much each sub-key is used by a chunk: sums over the queries that list it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_uses(
    tile, indices, shares, sums, n_memories, n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, TOP_K: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums (SPLITS,M,2,n) of one of the :func:`n_use_tiles` tiles: of BLOCK_U sub-keys and a SPLITS-th of the queries.

    A sub-key's sum is that of ``shares`` (M,R,T,H,2,k) over the places where ``indices`` names it, H heads together.
    Every access is compared with every sub-key: M S H 2 k n comparisons per chunk.
    """
    u_tiles: tl.constexpr = (SUBKEYS + BLOCK_U - 1) // BLOCK_U
    split = tile % SPLITS
    subkey = tile // SPLITS % u_tiles * BLOCK_U + tl.arange(0, BLOCK_U)
    half = tile // (SPLITS * u_tiles) % 2
    memory = tile // (SPLITS * u_tiles * 2)
    n_queries = n_rows * n_chunk
    n_each = tl.cdiv(tl.cdiv(n_queries, SPLITS), BLOCK_Q) * BLOCK_Q
    access = tl.arange(0, BLOCK_Q * BLOCK_K)
    place = access % BLOCK_K
    total = tl.zeros((BLOCK_U, BLOCK_Q * BLOCK_K), dtype=sums.dtype.element_ty)
    for done in range(0, n_each, BLOCK_Q):
        query = split * n_each + done + access // BLOCK_K
        there = (query < n_queries) & (place < TOP_K)
        token = (memory.to(tl.int64) * n_rows + query // n_chunk) * n_tokens + start + query % n_chunk
        for head in range(HEADS):
            entry = (token * (2 * HEADS) + 2 * head + half) * TOP_K + place
            index = tl.load(indices + entry, there, -1)
            share = tl.load(shares + entry, there, 0.0)
            total += tl.where(index[None, :] == subkey[:, None], share[None, :], 0.0)
    row = (memory * 2 + half) * SUBKEYS + subkey
    out = split * n_memories * (2 * SUBKEYS) + row
    tl.store(sums + out, tl.sum(total, axis=1), subkey < SUBKEYS)


@triton.jit
def n_use_tiles(n_memories, SUBKEYS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_U: tl.constexpr):
    """Tiles of BLOCK_U sub-keys and a SPLITS-th of the queries, of both halves of all memories."""
    return n_memories * (2 * SPLITS * ((SUBKEYS + BLOCK_U - 1) // BLOCK_U))


def use_tiles(n_memories: int, n_subkeys: int, top_k: int, n_queries: int, programs: int) -> tuple[int, int, int]:
    """Parts of the queries, sub-keys and queries of a tile: as many tiles as programs, 4096 comparisons at a time."""
    block_u = min(32, max(16, triton.next_power_of_2(n_subkeys)))
    block_q = max(1, 4096 // block_u // triton.next_power_of_2(top_k))
    n_tiles = n_memories * 2 * triton.cdiv(n_subkeys, block_u)
    return max(1, min(8, programs // n_tiles, triton.cdiv(n_queries, block_q))), block_u, block_q
