"""How much each sub-key is used by a chunk, and by which queries: sums and lists in the order of the queries."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def list_uses(
    tile, places, shares, listing, counts, mean, n_most, n_memories, n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_U sub-keys (m*2 + half)*n + i: which of the chunk's queries list them, and the mean of the shares.

    places (M,H,2,n,n_most) int8: 1 + the place of a sub-key in a query's list of k, 0 where the query doesn't list it;
    set to 0 again. listing (M,H,2,n,n_most) int32: the accesses query * k + place that list a sub-key, in the order of
    the queries; counts (M,H,2,n) int32 of them. mean (M,2,n) = sum of their shares (M,R,T,H,2,k) over S*H.

    Bytes per chunk: n S of places for each half and head, 4 k S of shares and of lists (all from the L2 cache).
    """
    row = tile * BLOCK_U + tl.arange(0, BLOCK_U)
    real = row < n_memories * 2 * SUBKEYS
    subkey = row % SUBKEYS
    half = row // SUBKEYS % 2
    memory = row // (2 * SUBKEYS)
    n_queries = n_rows * n_chunk
    used = tl.zeros((BLOCK_U,), dtype=shares.dtype.element_ty)
    for head in range(HEADS):
        half_head = head * 2 + half
        list_row = (memory * (2 * HEADS) + half_head).to(tl.int64) * SUBKEYS + subkey
        n_listed = tl.zeros((BLOCK_U,), dtype=tl.int32)
        # 32 bits hold the offsets of a chunk, see the launchers; there are n S of them, so that they set the pace.
        at_list = (list_row * n_most).to(tl.int32)
        at_memory = memory * (n_rows * n_tokens * (2 * HEADS * TOP_K)) + half_head * TOP_K - 1
        for first in range(0, n_queries, BLOCK_Q):
            query = first + tl.arange(0, BLOCK_Q)
            token = query // n_chunk * n_tokens + start + query % n_chunk
            at = at_list[:, None] + query[None, :]
            place = tl.load(places + at, real[:, None] & (query < n_queries)[None, :], 0).to(tl.int32)
            listed = place > 0
            flag = listed.to(tl.int32)
            position = n_listed[:, None] + tl.cumsum(flag, axis=1) - flag
            entry = at_memory[:, None] + (token * (2 * HEADS * TOP_K))[None, :] + place
            used += tl.sum(tl.load(shares + entry, listed, 0.0), axis=1)
            access = (query * TOP_K - 1)[None, :] + place
            tl.store(listing + at_list[:, None] + position, access, listed)
            n_listed += tl.sum(flag, axis=1)
            # All threads have loaded before any sets back.
            tl.debug_barrier()
            tl.store(places + at, tl.zeros(place.shape, dtype=tl.int8), listed)
        tl.store(counts + list_row, n_listed, real)
    tl.store(mean + row, used / (n_queries * HEADS), real)


def list_tile_sizes(n_queries: int) -> tuple[int, int]:
    """Sub-keys and queries that a program looks at together: 1024 of both, few enough for their registers."""
    block_q = max(16, min(256, triton.next_power_of_2(n_queries)))
    return min(32, 1024 // block_q), block_q
