"""Backward of :mod:`mixers.kernels.key_chain`: the chunks from the last to the first in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.barrier import begin, meet, meetings, n_programs
from mixers.kernels.key_backward import direction_rows, gradient_rows
from mixers.kernels.key_chain import PROGRAMS, row_tile_size, row_width
from mixers.kernels.key_step import ENTROPY_EPS, n_most_pieces, pull_pieces, step_subkeys, step_tiles, table_lane
from mixers.kernels.launch import launch
from mixers.kernels.use import list_tile_sizes, list_uses
from mixers.product_keys import IDW_EPS


@triton.jit(
    do_not_specialize=[
        "n_memories",
        "n_rows",
        "n_tokens",
        "chunk_size",
        "n_chunks",
        "n_most",
        "n_most_pieces",
        "last_step",
    ]
)
def key_chain_backward_kernel(
    q,  # (M,R,T,H,K)
    keys,  # (n_chunks + 1,M,H,2,n,K/2), or (1,M,H,2,n,K/2) if not STEP
    d_keys,  # in and out (M,H,2,n,K/2)
    indices,  # (M,R,T,H,2,k) int32
    measures,  # (M,R,T,H,2,k)
    probabilities,  # (M,R,T,H,2,k)
    d_half,  # (M,R,T,H,2,k)
    mean,  # (n_chunks,M,2,n), STEP only
    d_q,  # out (M,R,T,H,K)
    directions,  # scratch (M,R,T,H,2,k), STEP only
    tangents,  # scratch (M,R,T,H,2,k), STEP only
    coefficients,  # scratch (M,R,T,H,2,k)
    later_coefficients,  # scratch (M,R,T,H,2,k), STEP only
    mean_tangent,  # scratch (M,2,n)
    places,  # scratch (M,H,2,n,n_most) int8, zero before and after
    listing,  # scratch (M,H,2,n,n_most) int32
    counts,  # scratch (M,H,2,n) int32
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
    last_step,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    HALF: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    STEP: tl.constexpr,
    IDW_EPS: tl.constexpr,
    ENTROPY_EPS: tl.constexpr,
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
    for n_done in range(n_chunks):
        chunk = n_chunks - 1 - n_done
        start = chunk * chunk_size
        n_chunk = tl.minimum(chunk_size, n_tokens - start)
        n_queries = n_rows * n_chunk
        n_half_queries = n_memories * n_queries * (2 * HEADS)
        used = mean
        now = keys
        if STEP:
            used = mean + chunk * n_memories * (2 * SUBKEYS)
            now = keys + chunk * n_memories.to(tl.int64) * (2 * HEADS * SUBKEYS * HALF)
        for tile in range(program, tl.cdiv(n_half_queries, ROWS), n_together):
            direction_rows(
                tile * ROWS + tl.arange(0, ROWS), q, now, d_keys, indices, measures, probabilities, directions,
                tangents, places, n_half_queries, n_queries, n_most, n_rows, n_chunk, n_tokens, start,
                HEADS, SUBKEYS, HALF, TOP_K, IDW, IDW_EPS, STEP, ROW_D, BLOCK_K,
            )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, TIMED)

        # Keys that stand still need the lists only.
        shares = tangents if STEP else probabilities
        for tile in range(program, tl.cdiv(n_memories * (2 * SUBKEYS), LIST_U), n_together):
            list_uses(
                tile, places, shares, listing, counts, mean_tangent, n_most, n_memories, n_rows, n_chunk, n_tokens,
                start, HEADS, SUBKEYS, TOP_K, LIST_U, LIST_Q,
            )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, TIMED)

        for tile in range(program, tl.cdiv(n_half_queries, ROWS), n_together):
            gradient_rows(
                tile * ROWS + tl.arange(0, ROWS), q, now, d_keys, indices, measures, probabilities, directions,
                tangents, d_half, used, mean_tangent, d_q, coefficients, later_coefficients, lr, address_weight,
                n_queries * HEADS, n_half_queries, n_queries, n_rows, n_chunk, n_tokens, start,
                HEADS, SUBKEYS, HALF, TOP_K, IDW, IDW_EPS, ENTROPY_EPS, STEP, ROW_D, BLOCK_K,
            )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, TIMED)

        if chunk >= last_step:
            n_tables = n_memories * (2 * HEADS)
            first_table, lane, n_lanes = table_lane(n_tables)
            for table in range(first_table, n_tables, n_together):
                pull_pieces(
                    table, lane, n_lanes, q, listing, counts, indices, measures, probabilities, used, coefficients,
                    later_coefficients, pulls, totals, base_totals, lr, address_weight, n_queries * HEADS, n_most,
                    n_most_pieces, n_rows, n_chunk, n_tokens, start, HEADS, SUBKEYS, HALF, TOP_K,
                    IDW, False, IDW and STEP, IDW_EPS, ENTROPY_EPS, PULL_U, PULL_L, STEP_D, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            n_meetings += 1
            meet(arrived, n_meetings, TIMED)

            for tile in range(program, tl.cdiv(n_tables * SUBKEYS, STEP_U), n_together):
                step_subkeys(
                    tile, d_keys, now, counts, pulls, totals, base_totals, d_keys, n_most_pieces, n_memories,
                    HEADS, SUBKEYS, HALF, IDW, IDW and STEP, PULL_L, STEP_U, STEP_E, STEP_D, BLOCK_N,
                )  # fmt: skip
            n_meetings += 1
            meet(arrived, n_meetings, TIMED)


def key_chain_backward(
    q: Tensor,
    keys: Tensor,
    d_keys: Tensor,
    indices: Tensor,
    measures: Tensor,
    probabilities: Tensor,
    d_half: Tensor,
    mean: Tensor,
    d_q: Tensor,
    chunk_size: int,
    score: str,
    lr: float,
    address_weight: float,
    *,
    needs_keys: bool,
) -> None:
    """d_q (M,R,T,H,K) from the derivatives ``d_half`` (M,R,T,H,2,k) of the half scores and ``d_keys`` of the last keys.

    ``d_keys`` (M,H,2,n,K/2) is carried back from chunk to chunk in place: to the keys before the first, if
    ``needs_keys``. The other tensors: as :func:`mixers.kernels.key_chain.key_chain` used and left them.

    For what a chunk does see :func:`direction_rows`, :func:`list_uses`, :func:`gradient_rows`, :func:`step_subkeys`.
    """
    n_memories, n_rows, n_tokens, n_heads, _ = q.shape
    n_subkeys, half_dim, top_k = keys.shape[4], keys.shape[5], indices.shape[-1]
    n_most = n_rows * min(chunk_size, n_tokens)
    n_lists = n_memories * n_heads * 2 * n_subkeys
    assert max(n_lists * n_most, measures.numel()) < 2**31, "accesses of a chunk are counted in 32 bits"
    block_k = triton.next_power_of_2(top_k)
    programs = n_programs(q, PROGRAMS)
    rows = row_tile_size(n_memories * n_most * n_heads * 2, max(128, 32 * block_k), programs)
    list_u, list_q = list_tile_sizes(n_most)
    tiles = step_tiles(half_dim, n_subkeys)
    most_pieces = n_most_pieces(n_most, n_subkeys, top_k, tiles)
    n_sums = n_memories * n_heads * 2 * most_pieces
    scratch = [torch.empty_like(d_half) for _ in range(4)]
    n_chunks = triton.cdiv(n_tokens, chunk_size)
    arrived, timed = meetings(q, "key_chain_backward", n_chunks, ("direction", "list", "gradient", "pull", "step"))
    launch(
        key_chain_backward_kernel,
        (programs,),
        *(q, keys, d_keys, indices, measures, probabilities, d_half, mean, d_q, *scratch),
        *(q.new_empty(n_memories * 2 * n_subkeys), indices.new_zeros(n_lists * n_most, dtype=torch.int8)),
        *(indices.new_empty(n_lists * n_most), indices.new_empty(n_lists)),
        *(q.new_empty(n_sums * half_dim), q.new_empty(n_sums), q.new_empty(n_sums)),
        arrived,
        *(float(lr), float(address_weight), n_memories, n_rows, n_tokens, chunk_size),
        *(n_chunks, n_most, most_pieces, 0 if needs_keys else 1),
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        HALF=half_dim,
        TOP_K=top_k,
        IDW=score == "idw",
        STEP=address_weight != 0,
        IDW_EPS=IDW_EPS,
        ENTROPY_EPS=ENTROPY_EPS,
        ROWS=rows,
        ROW_D=row_width(rows, block_k, half_dim),
        LIST_U=list_u,
        LIST_Q=list_q,
        PULL_U=tiles.pull_u,
        PULL_L=tiles.pull_l,
        STEP_U=tiles.step_u,
        STEP_E=tiles.step_e,
        STEP_D=tiles.width,
        BLOCK_N=triton.next_power_of_2(n_subkeys),
        BLOCK_K=block_k,
        TIMED=timed,
        num_warps=4,
        cooperative=True,
    )
