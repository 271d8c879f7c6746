"""All addressing of a call: its chunks one after the other in one launch, the keys moved after each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.address import address_rows
from mixers.kernels.barrier import begin, meet, meetings, n_programs, shared_bytes
from mixers.kernels.key_step import ENTROPY_EPS, n_most_pieces, pull_pieces, step_subkeys, step_tiles, table_lane
from mixers.kernels.launch import launch
from mixers.kernels.select import n_rank_tiles, rank_tile, rank_tile_sizes
from mixers.kernels.use import list_tile_sizes, list_uses
from mixers.product_keys import IDW_EPS


@triton.jit(do_not_specialize=["n_memories", "n_rows", "n_tokens", "chunk_size", "n_chunks", "n_most", "n_most_pieces"])
def key_chain_kernel(
    q,  # (M,R,T,H,K)
    keys,  # in and out (n_chunks + 1,M,H,2,n,K/2), or (1,M,H,2,n,K/2) if not KEEP
    indices,  # out (M,R,T,H,2,k) int32
    measures,  # out (M,R,T,H,2,k)
    probabilities,  # out (M,R,T,H,2,k)
    mean,  # out (n_chunks,M,2,n), STEP only
    ranks,  # scratch (M,S,H,2,n)
    places,  # scratch (M,H,2,n,n_most) int8, zero before and after; STEP only
    listing,  # scratch (M,H,2,n,n_most) int32, STEP only
    counts,  # scratch (M,H,2,n) int32, STEP only
    pulls,  # scratch (M,H,2,n_most_pieces,K/2)
    totals,  # scratch (M,H,2,n_most_pieces)
    base_totals,  # scratch (M,H,2,n_most_pieces)
    arrived,  # of :func:`meetings`
    lr,
    address_weight,
    n_memories,
    n_rows,
    n_tokens,
    chunk_size,
    n_chunks,
    n_most,
    n_most_pieces,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    HALF: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    STEP: tl.constexpr,
    KEEP: tl.constexpr,
    IDW_EPS: tl.constexpr,
    ENTROPY_EPS: tl.constexpr,
    RANK_S: tl.constexpr,
    RANK_N: tl.constexpr,
    RANK_D: tl.constexpr,
    RANK_STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_D: tl.constexpr,
    LIST_U: tl.constexpr,
    LIST_Q: tl.constexpr,
    PULL_U: tl.constexpr,
    PULL_L: tl.constexpr,
    STEP_U: tl.constexpr,
    STEP_E: tl.constexpr,
    STEP_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TIMED: tl.constexpr,
):
    program = tl.program_id(0)
    n_together = tl.num_programs(0)
    n_meetings = 0
    begin(arrived, TIMED)
    now = keys
    for chunk in range(n_chunks):
        start = chunk * chunk_size
        n_chunk = tl.minimum(chunk_size, n_tokens - start)
        n_queries = n_rows * n_chunk
        for tile in range(program, n_rank_tiles(n_memories, n_queries, HEADS, SUBKEYS, RANK_S, RANK_N), n_together):
            rank_tile(
                tile, q, now, ranks, n_rows, n_chunk, n_tokens, start, HEADS, SUBKEYS, HALF, IDW,
                RANK_S, RANK_N, RANK_D, RANK_STAGES,
            )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, TIMED)

        n_half_queries = n_memories * n_queries * (2 * HEADS)
        for tile in range(program, tl.cdiv(n_half_queries, ROWS), n_together):
            address_rows(
                tile * ROWS + tl.arange(0, ROWS), q, now, ranks, indices, measures, probabilities, places,
                n_half_queries, n_queries, n_most, n_rows, n_chunk, n_tokens, start,
                HEADS, SUBKEYS, HALF, TOP_K, IDW, IDW_EPS, STEP, BLOCK_N, ROW_D, BLOCK_K,
            )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, TIMED)

        if STEP:
            used = mean + chunk * n_memories * (2 * SUBKEYS)
            for tile in range(program, tl.cdiv(n_memories * (2 * SUBKEYS), LIST_U), n_together):
                list_uses(
                    tile, places, probabilities, listing, counts, used, n_most, n_memories, n_rows, n_chunk, n_tokens,
                    start, HEADS, SUBKEYS, TOP_K, LIST_U, LIST_Q,
                )  # fmt: skip
            n_meetings += 1
            meet(arrived, n_meetings, TIMED)

            then = now
            if KEEP:
                then = now + n_memories.to(tl.int64) * (2 * HEADS * SUBKEYS * HALF)
            n_tables = n_memories * (2 * HEADS)
            first_table, lane, n_lanes = table_lane(n_tables)
            for table in range(first_table, n_tables, n_together):
                pull_pieces(
                    table, lane, n_lanes, q, listing, counts, indices, measures, probabilities, used, probabilities,
                    probabilities, pulls, totals, base_totals, lr, address_weight, n_queries * HEADS, n_most,
                    n_most_pieces, n_rows, n_chunk, n_tokens, start, HEADS, SUBKEYS, HALF, TOP_K,
                    IDW, True, False, IDW_EPS, ENTROPY_EPS, PULL_U, PULL_L, STEP_D, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            n_meetings += 1
            meet(arrived, n_meetings, TIMED)

            for tile in range(program, tl.cdiv(n_tables * SUBKEYS, STEP_U), n_together):
                step_subkeys(
                    tile, now, now, counts, pulls, totals, base_totals, then, n_most_pieces, n_memories,
                    HEADS, SUBKEYS, HALF, IDW, False, PULL_L, STEP_U, STEP_E, STEP_D, BLOCK_N,
                )  # fmt: skip
            now = then
            n_meetings += 1
            meet(arrived, n_meetings, TIMED)


def key_chain(
    q: Tensor,
    keys: Tensor,
    indices: Tensor,
    measures: Tensor,
    probabilities: Tensor,
    mean: Tensor,
    chunk_size: int,
    score: str,
    lr: float,
    address_weight: float,
) -> None:
    """Choose the k sub-keys of each half for all tokens of a call, and move the keys after each chunk.

    keys (n_chunks + 1,M,H,2,n,K/2), of which keys[0] is given and keys[c + 1] are those after chunk c; or (1,...),
    moved in place. With ``address_weight`` 0 they stand still, keys is (1,...) and ``mean`` is not written.

    For what a chunk does see :func:`rank_tile`, :func:`address_rows`, :func:`list_uses` and :func:`step_subkeys`: four
    steps that wait for one another. All are done by one launch whose programs meet between them, since at 512 tokens a
    chunk a launch of its own costs each more than its work. One meeting takes about 1 us on an H200.
    """
    n_memories, n_rows, n_tokens, n_heads, _ = q.shape
    n_kept, n_subkeys, half_dim = keys.shape[0], keys.shape[4], keys.shape[5]
    top_k = indices.shape[-1]
    n_most = n_rows * min(chunk_size, n_tokens)
    n_half_queries = n_memories * n_most * n_heads * 2
    n_lists = n_memories * n_heads * 2 * n_subkeys
    assert max(n_lists * n_most, measures.numel()) < 2**31, "accesses of a chunk are counted in 32 bits"
    step = address_weight != 0
    block_n, block_k = triton.next_power_of_2(n_subkeys), triton.next_power_of_2(top_k)
    programs = n_programs(q, PROGRAMS)
    rank_d = 32 if half_dim > 16 else 16
    rank_s, rank_n, rank_stages = rank_tile_sizes(n_subkeys, rank_d, shared_bytes(q, PROGRAMS))
    rows = row_tile_size(n_half_queries, block_n, programs)
    list_u, list_q = list_tile_sizes(n_most)
    tiles = step_tiles(half_dim, n_subkeys)
    most_pieces = n_most_pieces(n_most, n_subkeys, top_k, tiles)
    n_sums = n_memories * n_heads * 2 * most_pieces if step else 0
    counts = indices.new_empty(n_lists)
    n_chunks = triton.cdiv(n_tokens, chunk_size)
    arrived, timed = meetings(
        q, "key_chain", n_chunks, ("rank", "address", "list", "pull", "step") if step else ("rank", "address")
    )
    launch(
        key_chain_kernel,
        (programs,),
        *(q, keys, indices, measures, probabilities, mean, q.new_empty(n_half_queries * n_subkeys)),
        indices.new_zeros(n_lists * n_most if step else 0, dtype=torch.int8),
        indices.new_empty(n_lists * n_most if step else 0),
        counts,
        *(q.new_empty(n_sums * half_dim), q.new_empty(n_sums), q.new_empty(n_sums)),
        *(arrived, float(lr), float(address_weight)),
        *(n_memories, n_rows, n_tokens, chunk_size, n_chunks, n_most, most_pieces),
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        HALF=half_dim,
        TOP_K=top_k,
        IDW=score == "idw",
        STEP=step,
        KEEP=n_kept > 1,
        IDW_EPS=IDW_EPS,
        ENTROPY_EPS=ENTROPY_EPS,
        RANK_S=rank_s,
        RANK_N=rank_n,
        RANK_D=rank_d,
        RANK_STAGES=rank_stages,
        ROWS=rows,
        ROW_D=row_width(rows, block_k, half_dim),
        LIST_U=list_u,
        LIST_Q=list_q,
        PULL_U=tiles.pull_u,
        PULL_L=tiles.pull_l,
        STEP_U=tiles.step_u,
        STEP_E=tiles.step_e,
        STEP_D=tiles.width,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        TIMED=timed,
        num_warps=4,
        cooperative=True,
    )


# Programs of four warps on a multiprocessor: what their registers leave room for without a limit.
PROGRAMS = 2


def row_tile_size(n_half_queries: int, block_n: int, programs: int) -> int:
    """Half queries that a program addresses together: at most 4096 ranks, and enough tiles for all programs."""
    return max(1, min(4096 // block_n, triton.next_power_of_2(triton.cdiv(n_half_queries, programs))))


def row_width(rows: int, block_k: int, half_dim: int) -> int:
    """Elements of a key that a program gathers at a time for each of ``rows`` times k sub-keys."""
    return max(1, min(4096 // (rows * block_k), triton.next_power_of_2(half_dim)))
