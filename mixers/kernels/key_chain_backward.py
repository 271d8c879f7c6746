"""Backward of :mod:`mixers.kernels.key_chain`: the chunks from the last to the first in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.address import n_row_tiles, row_tile_size, split_queries
from mixers.kernels.barrier import meet, meetings, n_programs
from mixers.kernels.key_backward import direction_rows, gradient_rows
from mixers.kernels.key_chain import PROGRAMS, tile_constants
from mixers.kernels.key_step import ENTROPY_EPS, move_derivatives, n_pull_tiles, pull_tile, step_tiles
from mixers.kernels.launch import launch
from mixers.kernels.parts import new_parts, part_type, part_width
from mixers.kernels.use import n_use_tiles, sum_uses, use_tiles
from mixers.product_keys import IDW_EPS


@triton.jit(
    do_not_specialize=[
        "n_memories",
        "n_rows",
        "n_tokens",
        "chunk_size",
        "n_chunks",
        "n_most",
        "n_most_each",
        "last_step",
        "n_steps",
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
    kept_totals,  # (n_chunks,M,H,2,n), STEP and IDW only
    d_q,  # out (M,R,T,H,K)
    directions,  # scratch (M,R,T,H,2,k), STEP only
    tangents,  # scratch (M,R,T,H,2,k), STEP only
    coefficients,  # scratch (M,R,T,H,2,k)
    tangent_sums,  # scratch (USE_SPLITS,M,2,n), STEP only
    key_dots,  # scratch (M,H,2,n), STEP and IDW only
    q_parts,  # scratch (PARTS,M*S*H*2,WIDTH)
    q_units,  # scratch (M*S*H*2,)
    room,  # scratch (programs,k,n_most_each)
    index_room,  # scratch (programs,k,n_most_each) int32
    pulls,  # scratch (SPLITS,M,H,2,n,K/2)
    totals,  # scratch (SPLITS,M,H,2,n)
    arrived,  # of :func:`meetings`
    lr,
    address_weight,
    n_memories,
    n_rows,
    n_tokens,
    chunk_size,
    n_chunks,
    n_most,
    n_most_each,
    last_step,
    n_steps,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    STEP: tl.constexpr,
    IDW_EPS: tl.constexpr,
    ENTROPY_EPS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_D: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    USE_SPLITS: tl.constexpr,
    USE_U: tl.constexpr,
    USE_Q: tl.constexpr,
    SPLITS: tl.constexpr,
    PULL_U: tl.constexpr,
    PULL_L: tl.constexpr,
    PULL_C: tl.constexpr,
    PULL_D: tl.constexpr,
    PULL_STAGES: tl.constexpr,
    MOVE_U: tl.constexpr,
    MOVE_E: tl.constexpr,
    MOVE_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TIMED: tl.constexpr,
):
    program = tl.program_id(0)
    n_together = tl.num_programs(0)
    n_key_rows = n_memories * (2 * HEADS * SUBKEYS)
    n_half_most = n_memories * n_most * (2 * HEADS)
    if IDW and STEP:
        last_keys = keys + (n_chunks - 1) * n_key_rows.to(tl.int64) * HALF
        for tile in range(program, tl.cdiv(n_key_rows, MOVE_U), n_together):
            row = tile * MOVE_U + tl.arange(0, MOVE_U)
            d = tl.arange(0, MOVE_D)
            at = row.to(tl.int64)[:, None] * HALF + d[None, :]
            inside = (row < n_key_rows)[:, None] & (d < HALF)[None, :]
            product = tl.load(last_keys + at, inside, 0.0) * tl.load(d_keys + at, inside, 0.0)
            tl.store(key_dots + row, tl.sum(product, axis=1), row < n_key_rows)
    n_meetings = 1
    meet(arrived, n_meetings, program, n_together, TIMED)

    for n_done in range(n_chunks):
        chunk = n_chunks - 1 - n_done
        start = chunk * chunk_size
        n_chunk = tl.minimum(chunk_size, n_tokens - start)
        n_queries = n_rows * n_chunk
        n_tiles = n_row_tiles(n_memories, n_rows, n_chunk, HEADS, ROWS)
        used = mean
        now = keys
        # All tiles or none.
        n_stepped = n_tiles * 0
        if STEP:
            used = mean + chunk * n_memories * (2 * SUBKEYS)
            now = keys + chunk * n_key_rows.to(tl.int64) * HALF
            n_stepped = tl.where(chunk < n_steps, n_tiles, 0)
            for tile in range(program, n_stepped, n_together):
                direction_rows(
                    tile, q, d_keys, key_dots, indices, measures, probabilities, directions, tangents,
                    n_rows, n_chunk, n_tokens, start, HEADS, SUBKEYS, HALF, TOP_K,
                    IDW, IDW_EPS, ROWS, ROW_D, BLOCK_K,
                )  # fmt: skip
        if chunk >= last_step:
            n_split_tiles = n_row_tiles(n_memories, n_rows, n_chunk, HEADS, SPLIT_ROWS)
            for tile in range(n_together - 1 - program, n_split_tiles, n_together):
                split_queries(
                    tile, q, q_parts, q_units, q_units, n_half_most, n_rows, n_chunk, n_tokens, start,
                    HEADS, HALF, WIDTH, PARTS, False, SPLIT_ROWS, MOVE_D,
                )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, program, n_together, TIMED)

        if STEP:
            n_uses = n_use_tiles(n_memories, SUBKEYS, USE_SPLITS, USE_U)
            for tile in range(program, tl.where(chunk < n_steps, n_uses, 0), n_together):
                sum_uses(
                    tile, indices, tangents, tangent_sums, n_memories, n_rows, n_chunk, n_tokens, start,
                    HEADS, SUBKEYS, TOP_K, USE_SPLITS, USE_U, USE_Q, BLOCK_K,
                )  # fmt: skip
            n_meetings += 1
            meet(arrived, n_meetings, program, n_together, TIMED)

        if STEP:
            for tile in range(program, n_stepped, n_together):
                gradient_rows(
                    tile, q, now, d_keys, indices, measures, probabilities, directions, tangents, d_half, used,
                    tangent_sums, d_q, coefficients, lr, address_weight, n_queries * HEADS, n_memories,
                    n_rows, n_chunk, n_tokens, start,
                    HEADS, SUBKEYS, HALF, TOP_K, IDW, IDW_EPS, ENTROPY_EPS, True, USE_SPLITS, ROWS, ROW_D, BLOCK_K,
                )  # fmt: skip
        for tile in range(program, n_tiles - n_stepped, n_together):
            gradient_rows(
                tile, q, now, d_keys, indices, measures, probabilities, directions, tangents, d_half, used,
                tangent_sums, d_q, coefficients, lr, address_weight, n_queries * HEADS, n_memories,
                n_rows, n_chunk, n_tokens, start,
                HEADS, SUBKEYS, HALF, TOP_K, IDW, IDW_EPS, ENTROPY_EPS, False, USE_SPLITS, ROWS, ROW_D, BLOCK_K,
            )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, program, n_together, TIMED)

        if chunk >= last_step:
            my_room = program * n_most_each * TOP_K
            n_pulls = n_pull_tiles(n_memories, HEADS, SUBKEYS, HALF, SPLITS, PULL_U, PULL_D)
            for tile in range(program, n_pulls, n_together):
                pull_tile(
                    tile, room + my_room, index_room + my_room, q_parts, q_units, indices, measures, probabilities,
                    mean, 1.0, coefficients, pulls, totals, lr, address_weight, n_queries * HEADS, n_memories,
                    n_queries, n_half_most, n_most_each, n_rows, n_chunk, n_tokens, start,
                    HEADS, SUBKEYS, HALF, WIDTH, PARTS, TOP_K, IDW, False, IDW_EPS, ENTROPY_EPS,
                    SPLITS, PULL_U, PULL_L, PULL_C, PULL_D, BLOCK_K, PULL_STAGES,
                )  # fmt: skip
            n_meetings += 1
            meet(arrived, n_meetings, program, n_together, TIMED)

            before = now
            if STEP and chunk > 0:
                before = now - n_key_rows.to(tl.int64) * HALF
            for tile in range(program, tl.cdiv(n_key_rows, MOVE_U), n_together):
                move_derivatives(
                    tile * MOVE_U + tl.arange(0, MOVE_U), d_keys, now, before, pulls, totals,
                    kept_totals + chunk * n_key_rows, key_dots, chunk, n_steps, n_memories,
                    HEADS, SUBKEYS, HALF, IDW, STEP, SPLITS, MOVE_E, MOVE_D,
                )  # fmt: skip
            n_meetings += 1
            meet(arrived, n_meetings, program, n_together, TIMED)


def key_chain_backward(
    q: Tensor,
    keys: Tensor,
    d_keys: Tensor,
    indices: Tensor,
    measures: Tensor,
    probabilities: Tensor,
    d_half: Tensor,
    mean: Tensor,
    totals: Tensor,
    d_q: Tensor,
    chunk_size: int,
    score: str,
    lr: float,
    address_weight: float,
    *,
    needs_keys: bool,
    given: bool = True,
) -> None:
    """d_q (M,R,T,H,K) from the derivatives ``d_half`` (M,R,T,H,2,k) of the half scores and ``d_keys`` of the last keys.

    ``d_keys`` (M,H,2,n,K/2) is carried back from chunk to chunk in place: to the keys before the first, if
    ``needs_keys``. If it is not ``given`` it is zero, and the last chunk's step has no part in anything. The other
    tensors: as :func:`mixers.kernels.key_chain.key_chain` used and left them.

    For what a chunk does see :func:`direction_rows`, :func:`sum_uses`, :func:`gradient_rows`, :func:`pull_tile` and
    :func:`move_derivatives`: five steps that wait for one another.
    """
    n_memories, n_rows, n_tokens, n_heads, _ = q.shape
    n_subkeys, half_dim, top_k = keys.shape[4], keys.shape[5], indices.shape[-1]
    n_most = n_rows * min(chunk_size, n_tokens)
    n_tables, n_chunks = n_memories * n_heads * 2, triton.cdiv(n_tokens, chunk_size)
    assert max(n_tables * n_most, measures.numel()) < 2**31, "accesses of a chunk are counted in 32 bits"
    step = address_weight != 0
    programs = n_programs(q, PROGRAMS)
    tiles = step_tiles(n_tables, n_subkeys, half_dim, top_k, n_most, programs)
    n_rooms = programs * top_k * tiles.n_each(n_most)
    n_pulls = tiles.splits * n_tables * n_subkeys
    n_chunk_rows = min(chunk_size, n_tokens) * n_heads * 2
    block_k = triton.next_power_of_2(top_k)
    rows = row_tile_size(n_chunk_rows, n_memories * n_rows, 4096 // max(128, 32 * block_k), programs)
    use_splits, use_u, use_q = use_tiles(n_memories, n_subkeys, top_k, n_most, programs)
    scratch = [torch.empty_like(d_half) for _ in range(3)]
    steps = ("direction", "use", "gradient", "pull", "step") if step else ("direction", "gradient", "pull", "step")
    arrived, timed = meetings(q, "key_chain_backward", n_chunks, steps, n_before=1)
    launch(
        key_chain_backward_kernel,
        (programs,),
        *(q, keys, d_keys, indices, measures, probabilities, d_half, mean, totals, d_q, *scratch),
        *(q.new_empty(use_splits * n_memories * 2 * n_subkeys), q.new_empty(n_tables * n_subkeys)),
        *new_parts(q, n_tables * n_most, half_dim),
        *(q.new_empty(n_rooms), indices.new_empty(n_rooms), q.new_empty(n_pulls * half_dim), q.new_empty(n_pulls)),
        *(arrived, float(lr), float(address_weight)),
        *(n_memories, n_rows, n_tokens, chunk_size, n_chunks, n_most, tiles.n_each(n_most)),
        *(0 if needs_keys else 1, n_chunks if given else n_chunks - 1),
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        HALF=half_dim,
        WIDTH=part_width(half_dim),
        PARTS=part_type(q.dtype)[1],
        TOP_K=top_k,
        IDW=score == "idw",
        STEP=step,
        IDW_EPS=IDW_EPS,
        ENTROPY_EPS=ENTROPY_EPS,
        ROWS=rows,
        ROW_D=max(1, min(4096 // (rows * block_k), triton.next_power_of_2(half_dim))),
        SPLIT_ROWS=row_tile_size(n_chunk_rows, n_memories * n_rows, max(1, 8192 // tiles.move_d), programs),
        USE_SPLITS=use_splits,
        USE_U=use_u,
        USE_Q=use_q,
        **tile_constants(tiles),
        BLOCK_K=block_k,
        TIMED=timed,
        num_warps=4,
        cooperative=True,
    )
