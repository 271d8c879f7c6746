"""All addressing of a call: its chunks one after the other in one launch, the keys moved after each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.address import address_rows, n_row_tiles, row_tile_size, split_queries
from mixers.kernels.barrier import meet, meetings, n_programs, shared_bytes
from mixers.kernels.key_step import (
    ENTROPY_EPS,
    StepTiles,
    move_subkeys,
    n_pull_tiles,
    pull_tile,
    pulled_rows,
    split_keys,
    step_tiles,
)
from mixers.kernels.launch import launch
from mixers.kernels.listed import WORD_BITS, pulled_by_list
from mixers.kernels.parts import new_parts, part_type, part_width
from mixers.kernels.select import n_rank_tiles, rank_tile, rank_tile_sizes
from mixers.product_keys import IDW_EPS

# Integers of the kernel that no variant of its own is compiled for.
KEY_SIZES = [
    "n_memories", "n_rows", "n_tokens", "chunk_size", "n_chunks", "n_most", "n_most_each", "n_steps", "n_words",
]  # fmt: skip


class KeyWork(NamedTuple):
    """What :func:`key_chain` addresses, and where to.

    q (M,R,T,H,K); keys (n_chunks + 1,M,H,2,n,K/2) or (1,M,H,2,n,K/2); indices int32, measures and probabilities
    (M,R,T,H,2,k); mean (n_chunks,M,2,n); totals (n_chunks,M,H,2,n).
    """

    q: Tensor
    keys: Tensor
    indices: Tensor
    measures: Tensor
    probabilities: Tensor
    mean: Tensor
    totals: Tensor
    chunk_size: int
    score: str
    lr: float
    address_weight: float


@triton.jit
def address_chunks(
    program, n_together,
    q, keys, indices, measures, probabilities, mean, kept_totals, uses, ranks, q_parts, q_units, q_squares, key_parts,
    key_units, key_squares, room, index_room, pulls, totals, noted, arrived, lr, address_weight, use_scale,
    n_memories, n_rows, n_tokens, chunk_size, n_chunks, n_most, n_most_each, n_steps, n_words,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    TOP_K: tl.constexpr, IDW: tl.constexpr, STEP: tl.constexpr, KEEP: tl.constexpr, LISTS: tl.constexpr,
    BLOCK_L: tl.constexpr, IDW_EPS: tl.constexpr, ENTROPY_EPS: tl.constexpr, RANK_S: tl.constexpr,
    RANK_N: tl.constexpr, RANK_D: tl.constexpr, RANK_STAGES: tl.constexpr, ROWS: tl.constexpr,
    SPLIT_ROWS: tl.constexpr, SPLITS: tl.constexpr, PULL_U: tl.constexpr, PULL_L: tl.constexpr, PULL_C: tl.constexpr,
    PULL_D: tl.constexpr, PULL_STAGES: tl.constexpr, MOVE_U: tl.constexpr, MOVE_E: tl.constexpr, MOVE_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    """All chunks of :func:`key_chain_kernel`, whose arguments these are, by ``program`` of ``n_together``."""
    n_key_rows = n_memories * (2 * HEADS * SUBKEYS)
    n_half_most = n_memories * n_most * (2 * HEADS)
    now = keys
    for tile in range(program, tl.cdiv(n_key_rows, MOVE_U), n_together):
        row = tile * MOVE_U + tl.arange(0, MOVE_U)
        d = tl.arange(0, MOVE_D)
        inside = (row < n_key_rows)[:, None] & (d < HALF)[None, :]
        key = tl.load(now + row.to(tl.int64)[:, None] * HALF + d[None, :], inside, 0.0)
        split_keys(row, row < n_key_rows, key, key_parts, key_units, key_squares, n_key_rows, IDW, WIDTH, PARTS)
    n_first = tl.minimum(chunk_size, n_tokens)
    for tile in range(program, n_row_tiles(n_memories, n_rows, n_first, HEADS, SPLIT_ROWS), n_together):
        split_queries(
            tile, q, q_parts, q_units, q_squares, n_half_most, n_rows, n_first, n_tokens, 0,
            HEADS, HALF, WIDTH, PARTS, IDW, SPLIT_ROWS, MOVE_D,
        )  # fmt: skip
    n_meetings = 1
    meet(arrived, n_meetings, program, n_together, TIMED)

    for chunk in range(n_chunks):
        start = chunk * chunk_size
        n_chunk = tl.minimum(chunk_size, n_tokens - start)
        n_queries = n_rows * n_chunk
        units, squares = q_units + chunk % 2 * n_half_most, q_squares + chunk % 2 * n_half_most
        parts = q_parts + (chunk % 2) * n_half_most.to(tl.int64) * (PARTS * WIDTH)
        for tile in range(program, n_rank_tiles(n_memories, n_queries, HEADS, SUBKEYS, RANK_S, RANK_N), n_together):
            rank_tile(
                tile, parts, units, key_parts, key_units, key_squares, ranks, n_memories, n_queries, n_half_most,
                HEADS, SUBKEYS, WIDTH, IDW, PARTS, RANK_S, RANK_N, RANK_D, RANK_STAGES,
            )  # fmt: skip
        # The next chunk's queries, by the last programs first: few queries have fewer tiles of ranks than programs.
        n_next = tl.minimum(chunk_size, n_tokens - start - n_chunk)
        next = (chunk + 1) % 2
        for tile in range(
            n_together - 1 - program, n_row_tiles(n_memories, n_rows, n_next, HEADS, SPLIT_ROWS), n_together
        ):
            split_queries(
                tile, q, q_parts + next * n_half_most.to(tl.int64) * (PARTS * WIDTH), q_units + next * n_half_most,
                q_squares + next * n_half_most, n_half_most, n_rows, n_next, n_tokens, start + n_chunk,
                HEADS, HALF, WIDTH, PARTS, IDW, SPLIT_ROWS, MOVE_D,
            )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, program, n_together, TIMED)

        used = uses + chunk * n_memories * (2 * SUBKEYS)
        for tile in range(program, n_row_tiles(n_memories, n_rows, n_chunk, HEADS, ROWS), n_together):
            address_rows(
                tile, q, now, ranks, squares, indices, measures, probabilities, used, use_scale,
                noted, n_words, n_rows, n_chunk, n_tokens, start,
                HEADS, SUBKEYS, HALF, TOP_K, IDW, IDW_EPS, STEP, LISTS, ROWS, BLOCK_N, MOVE_D,
            )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, program, n_together, TIMED)

        if STEP:
            if not LISTS:
                my_room = program * n_most_each * TOP_K
                n_pulls = n_pull_tiles(n_memories, HEADS, SUBKEYS, HALF, SPLITS, PULL_U, PULL_D)
                for tile in range(program, tl.where(chunk < n_steps, n_pulls, 0), n_together):
                    pull_tile(
                        tile, room + my_room, index_room + my_room, parts, units, indices, measures, probabilities,
                        used, use_scale, probabilities, pulls, totals, lr, address_weight, n_queries * HEADS,
                        n_memories, n_queries, n_half_most, n_most_each, n_rows, n_chunk, n_tokens, start,
                        HEADS, SUBKEYS, HALF, WIDTH, PARTS, TOP_K, IDW, True, IDW_EPS, ENTROPY_EPS,
                        SPLITS, PULL_U, PULL_L, PULL_C, PULL_D, BLOCK_K, PULL_STAGES,
                    )  # fmt: skip
                n_meetings += 1
                meet(arrived, n_meetings, program, n_together, TIMED)

            then = now
            if KEEP:
                then = now + n_memories.to(tl.int64) * (2 * HEADS * SUBKEYS * HALF)
            n_moves = tl.where(chunk < n_steps, tl.cdiv(n_key_rows, MOVE_U), 0)
            for tile in range(program, n_moves, n_together):
                row = tile * MOVE_U + tl.arange(0, MOVE_U)
                d = tl.arange(0, MOVE_D)
                inside = (row < n_key_rows)[:, None] & (d < HALF)[None, :]
                key = tl.load(now + row.to(tl.int64)[:, None] * HALF + d[None, :], inside, 0.0)
                if LISTS:
                    my_room = program * (MOVE_U * BLOCK_L)
                    pulled, total = pulled_by_list(
                        tile * MOVE_U, n_key_rows, room + my_room, index_room + my_room, q, noted, indices, measures,
                        probabilities, used, use_scale, lr, address_weight, n_queries * HEADS, n_words,
                        n_rows, n_chunk, n_tokens, start, HEADS, SUBKEYS, HALF, TOP_K, IDW, IDW_EPS, ENTROPY_EPS,
                        MOVE_U, BLOCK_L, MOVE_E, MOVE_D, BLOCK_K,
                    )  # fmt: skip
                else:
                    pulled, total = pulled_rows(row, pulls, totals, n_key_rows, HALF, IDW, SPLITS, MOVE_E, MOVE_D)
                move_subkeys(
                    row, key, pulled, total, then, kept_totals + chunk * n_key_rows, used, use_scale,
                    mean + chunk * n_memories * (2 * SUBKEYS), key_parts, key_units, key_squares, n_queries * HEADS,
                    n_memories, HEADS, SUBKEYS, HALF, WIDTH, PARTS, IDW, KEEP, MOVE_D,
                )  # fmt: skip
            now = then
            n_meetings += 1
            meet(arrived, n_meetings, program, n_together, TIMED)


@triton.jit(do_not_specialize=KEY_SIZES)
def key_chain_kernel(
    q,  # (M,R,T,H,K)
    keys,  # in and out (n_chunks + 1,M,H,2,n,K/2), or (1,M,H,2,n,K/2) if not KEEP
    indices,  # out (M,R,T,H,2,k) int32
    measures,  # out (M,R,T,H,2,k)
    probabilities,  # out (M,R,T,H,2,k)
    mean,  # out (n_chunks,M,2,n), STEP only
    kept_totals,  # out (n_chunks,M,H,2,n), STEP and KEEP and IDW only
    uses,  # scratch (n_chunks,M,2,n) int64, zero before, STEP only
    ranks,  # scratch (M,S,H,2,n)
    q_parts,  # scratch (2,PARTS,M*S*H*2,WIDTH), of this chunk and the next
    q_units,  # scratch (2,M*S*H*2)
    q_squares,  # scratch (2,M*S*H*2)
    key_parts,  # scratch (PARTS,M*H*2*n,WIDTH)
    key_units,  # scratch (M*H*2*n,)
    key_squares,  # scratch (M*H*2*n,)
    room,  # scratch (programs,k,n_most_each), STEP only; with LISTS (programs,MOVE_U*BLOCK_L)
    index_room,  # int32, of the same size
    pulls,  # scratch (SPLITS,M,H,2,n,K/2), STEP and not LISTS only
    totals,  # scratch (SPLITS,M,H,2,n), STEP and not LISTS only
    noted,  # scratch (M,H,2,n,n_words) int32, zero before, STEP and LISTS only
    arrived,  # of :func:`meetings`
    lr,
    address_weight,
    use_scale,
    n_memories,
    n_rows,
    n_tokens,
    chunk_size,
    n_chunks,
    n_most,
    n_most_each,
    n_steps,
    n_words,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    STEP: tl.constexpr,
    KEEP: tl.constexpr,
    LISTS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    IDW_EPS: tl.constexpr,
    ENTROPY_EPS: tl.constexpr,
    RANK_S: tl.constexpr,
    RANK_N: tl.constexpr,
    RANK_D: tl.constexpr,
    RANK_STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    PULL_U: tl.constexpr,
    PULL_L: tl.constexpr,
    PULL_C: tl.constexpr,
    PULL_D: tl.constexpr,
    PULL_STAGES: tl.constexpr,
    MOVE_U: tl.constexpr,
    MOVE_E: tl.constexpr,
    MOVE_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TIMED: tl.constexpr,
):
    address_chunks(
        tl.program_id(0), tl.num_programs(0),
        q, keys, indices, measures, probabilities, mean, kept_totals, uses, ranks, q_parts, q_units, q_squares,
        key_parts, key_units, key_squares, room, index_room, pulls, totals, noted, arrived, lr, address_weight,
        use_scale, n_memories, n_rows, n_tokens, chunk_size, n_chunks, n_most, n_most_each, n_steps, n_words, HEADS,
        SUBKEYS, HALF, WIDTH, PARTS, TOP_K, IDW, STEP, KEEP, LISTS, BLOCK_L, IDW_EPS, ENTROPY_EPS, RANK_S, RANK_N,
        RANK_D, RANK_STAGES, ROWS, SPLIT_ROWS, SPLITS, PULL_U, PULL_L, PULL_C, PULL_D, PULL_STAGES, MOVE_U, MOVE_E,
        MOVE_D, BLOCK_N, BLOCK_K, TIMED,
    )  # fmt: skip


def key_chain(work: KeyWork, *, goes_on: bool = True) -> None:
    """Choose the k sub-keys of each half for all tokens of a call, and move the keys after each chunk.

    keys (n_chunks + 1,M,H,2,n,K/2), of which keys[0] is given and keys[c + 1] are those after chunk c; or (1,...),
    moved in place. ``totals`` (n_chunks,M,H,2,n) is written with more than one of them, for the backward. Unless the
    memory ``goes_on``, the last chunk does not move them, and its ``mean`` and ``totals`` are not written. With
    ``address_weight`` 0 they stand still, keys is (1,...) and neither ``mean`` nor ``totals`` is written.

    For what a chunk does see :func:`rank_tile`, :func:`address_rows`, :func:`pull_tile` and :func:`move_subkeys`: four
    steps that wait for one another. Of short chunks the move finds its sums itself, by :func:`pulled_by_list`: three.
    All are done by one launch whose programs meet between them, since at 512 tokens a chunk a launch of its own costs
    each more than its work. One meeting takes about 1 us on an H200.
    """
    programs, arguments, constants = key_arguments(work, goes_on=goes_on)
    launch(key_chain_kernel, (programs,), *arguments, **constants, num_warps=4, cooperative=True)


def key_arguments(work: KeyWork, *, goes_on: bool, n_beside: int = 0) -> tuple[int, tuple, dict[str, object]]:
    """How many programs :func:`key_chain` launches, with ``n_beside`` others on each multiprocessor, and with what."""
    q, keys, indices, measures, probabilities, mean, totals, chunk_size, score, lr, address_weight = work
    n_memories, n_rows, n_tokens, n_heads, _ = q.shape
    n_kept, n_subkeys, half_dim = keys.shape[0], keys.shape[4], keys.shape[5]
    top_k = indices.shape[-1]
    n_most = n_rows * min(chunk_size, n_tokens)
    n_tables = n_memories * n_heads * 2
    n_half_queries, n_key_rows = n_tables * n_most, n_tables * n_subkeys
    assert max(n_half_queries, measures.numel()) < 2**31, "accesses of a chunk are counted in 32 bits"
    step = address_weight != 0
    block_n, block_k = triton.next_power_of_2(n_subkeys), triton.next_power_of_2(top_k)
    programs = n_programs(q, PROGRAMS)
    rank_s, rank_n, rank_d, rank_stages = rank_tile_sizes(
        n_tables, n_most, n_subkeys, half_dim, programs, shared_bytes(q, PROGRAMS + n_beside)
    )
    n_chunk_rows = min(chunk_size, n_tokens) * n_heads * 2
    tiles = step_tiles(n_tables, n_subkeys, half_dim, top_k, n_most, programs)
    n_each = tiles.n_each(n_most)
    n_chunks = triton.cdiv(n_tokens, chunk_size)
    uses = torch.zeros(n_chunks * n_memories * 2 * n_subkeys if step else 0, dtype=torch.int64, device=q.device)
    q_parts, q_units = new_parts(q, 2 * n_half_queries, half_dim)
    key_parts, key_units = new_parts(q, n_key_rows, half_dim)
    # Where lists are long, products of matrices take less time than rows gathered one by one.
    lists = step and n_most * top_k <= MEAN_LIST * n_subkeys
    constants = tile_constants(tiles)
    steps, n_rooms, n_pulls, n_words = ("rank", "address"), 0, 0, 0
    if lists:
        steps, n_words = (*steps, "move"), triton.cdiv(n_most, WORD_BITS.value)
        n_rooms = programs * tiles.move_u * LISTED
        constants["MOVE_E"] = max(1, min(LISTED, GATHERED // (tiles.move_u * tiles.move_d)))
    elif step:
        steps, n_rooms, n_pulls = (*steps, "pull", "step"), programs * top_k * n_each, tiles.splits * n_key_rows
    arrived, timed = meetings(q, "key_chain", n_chunks, steps, n_before=1)
    noted = torch.zeros(n_key_rows * n_words, dtype=torch.int32, device=q.device)
    arguments = (
        *(q, keys, indices, measures, probabilities, mean, totals, uses, q.new_empty(n_half_queries * n_subkeys)),
        *(q_parts, q_units, torch.empty_like(q_units), key_parts, key_units, torch.empty_like(key_units)),
        *(q.new_empty(n_rooms), indices.new_empty(n_rooms), q.new_empty(n_pulls * half_dim), q.new_empty(n_pulls)),
        *(noted, arrived, float(lr), float(address_weight), use_unit(n_most * n_heads)),
        *(n_memories, n_rows, n_tokens, chunk_size, n_chunks, n_most, n_each, n_chunks if goes_on else n_chunks - 1),
        n_words,
    )
    constants |= {
        "HEADS": n_heads,
        "SUBKEYS": n_subkeys,
        "HALF": half_dim,
        "WIDTH": part_width(half_dim),
        "PARTS": part_type(q.dtype)[1],
        "TOP_K": top_k,
        "IDW": score == "idw",
        "STEP": step,
        "KEEP": n_kept > 1,
        "LISTS": lists,
        "BLOCK_L": LISTED,
        "IDW_EPS": IDW_EPS,
        "ENTROPY_EPS": ENTROPY_EPS,
        "RANK_S": rank_s,
        "RANK_N": rank_n,
        "RANK_D": rank_d,
        "RANK_STAGES": rank_stages,
        "ROWS": row_tile_size(n_chunk_rows, n_memories * n_rows, 4096 // block_n, programs),
        "SPLIT_ROWS": row_tile_size(n_chunk_rows, n_memories * n_rows, max(1, 8192 // tiles.move_d), programs),
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "TIMED": timed,
    }
    return programs, arguments, constants


# Programs of four warps on a multiprocessor: what their registers leave room for without a limit.
PROGRAMS = 2
# Sub-keys are moved by lists of their queries where these have at most MEAN_LIST on average; LISTED of a list, GATHERED
# elements of its queries are looked at together.
MEAN_LIST, LISTED, GATHERED = 16, 32, 4096


def use_unit(n_shares: int) -> float:
    """Parts of 1 that the shares, of which there are ``n_shares``, are counted in: 64 bits hold their sum."""
    return float(2 ** (62 - n_shares.bit_length()))


def tile_constants(tiles: StepTiles) -> dict[str, int]:
    """The tiles under the names that both chains' kernels have for them."""
    return {
        "SPLITS": tiles.splits,
        "PULL_U": tiles.pull_u,
        "PULL_L": tiles.pull_l,
        "PULL_C": tiles.pull_c,
        "PULL_D": tiles.pull_d,
        "PULL_STAGES": tiles.stages,
        "MOVE_U": tiles.move_u,
        "MOVE_E": tiles.move_e,
        "MOVE_D": tiles.move_d,
    }
