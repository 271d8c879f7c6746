"""The k best sub-keys of each half, their scores, the k best sums, and the softmax over a token's slots."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.launch import launch
from mixers.kernels.listed import note_queries
from mixers.kernels.parts import write_parts
from mixers.kernels.select import choose_best, choose_best_of_parts, from_order, in_order, order_in_parts
from mixers.product_keys import IDW_EPS


@triton.jit
def half_queries(tile, n_rows, n_chunk, n_tokens, start, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Of the ROWS half queries of one of the :func:`n_row_tiles` tiles of a chunk, all of one sequence.

    Their rows (m*S + s)*2H + 2h + half in the chunk and among those of the call, whether they exist, their memory (one
    for all) and 2h + half.
    """
    n_sequence = n_chunk * (2 * HEADS)
    n_tiles = tl.cdiv(n_sequence, ROWS)
    sequence = tile // n_tiles
    at = tile % n_tiles * ROWS + tl.arange(0, ROWS)
    q_row = (sequence.to(tl.int64) * n_tokens + start) * (2 * HEADS) + at
    return sequence * n_sequence + at, q_row, at < n_sequence, sequence // n_rows, at % (2 * HEADS)


@triton.jit
def n_row_tiles(n_memories, n_rows, n_chunk, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Tiles of ROWS half queries of all sequences."""
    return n_memories * n_rows * tl.cdiv(n_chunk * (2 * HEADS), ROWS)


def row_tile_size(n_chunk_rows: int, n_sequences: int, most: int, programs: int) -> int:
    """Half queries of a tile: at most ``most``, and enough tiles for all programs. ``n_chunk_rows`` of a sequence."""
    each = triton.cdiv(n_chunk_rows * n_sequences, programs)
    return max(1, min(most, triton.next_power_of_2(each), triton.next_power_of_2(n_chunk_rows)))


@triton.jit
def split_queries(
    tile, q, parts, units, squares, n_most, n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    SQUARES: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of a tile of half queries of a chunk: their parts, units and, with SQUARES, |q_half|^2, by row."""
    row, q_row, exists, _, _ = half_queries(tile, n_rows, n_chunk, n_tokens, start, HEADS, ROWS)
    d = tl.arange(0, BLOCK_D)
    half = tl.load(q + q_row[:, None] * HALF + d[None, :], exists[:, None] & (d < HALF)[None, :], 0.0)
    write_parts(half, row, exists, parts, units, n_most, WIDTH, PARTS)
    if SQUARES:
        tl.store(squares + row, tl.sum(half * half, axis=1), exists)


@triton.jit
def address_rows(
    tile, q, keys, ranks, squares, indices, measures, probabilities, uses, use_scale,
    noted, n_words, n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, TOP_K: tl.constexpr,
    IDW: tl.constexpr, EPS: tl.constexpr, STEP: tl.constexpr, LISTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of a tile of half queries: the k sub-keys of highest rank, their measures and the softmax of their scores.

    indices (M,R,T,H,2,k) int32, best first; equal ranks: the lowest index. measures: |q_half - key|^2 (``idw``) or
    <q_half, key> (``dot``). The rank gives both: |q|^2 (``squares``) - rank, or the rank itself, where no sub-key of
    the tile is nearer than half |q|^2: there the difference is a few ulp from its terms; else the elements do.

    With STEP, ``uses`` (M,2,n) int64 receives the sums of the shares in units of 1/``use_scale``, a power of two: sums
    of integers, which are the same in whatever order they come. With LISTS besides, ``noted`` receives who lists whom,
    see :func:`mixers.kernels.listed.note_queries`.

    Bytes per token: 2 H n ranks; with near sub-keys 2 H k K/2 key elements and H K of q (all from the L2 cache).
    """
    row, q_row, exists, memory, half_head = half_queries(tile, n_rows, n_chunk, n_tokens, start, HEADS, ROWS)
    WIDE: tl.constexpr = min(BLOCK_N, 128)
    place = tl.arange(0, 32)
    order = order_in_parts(ranks, row, exists, SUBKEYS, WIDE, BLOCK_N // WIDE)
    subkey = tl.arange(0, WIDE)[:, None] + (tl.arange(0, BLOCK_N // WIDE) * WIDE)[None, :]
    found, index = choose_best_of_parts(order, subkey, TOP_K)
    # From here on the first k of 32 columns, one a thread, are used.
    listed = exists[:, None] & (place < TOP_K)[None, :]
    entry = q_row[:, None] * TOP_K + place[None, :]
    tl.store(indices + entry, index, listed)
    if STEP and LISTS:
        query = (row // (2 * HEADS)).to(tl.int32) - memory * n_rows * n_chunk
        note_queries(memory * (2 * HEADS) + half_head, query, index, listed, noted, n_words, SUBKEYS)

    measure = from_order(found)
    if IDW:
        square = tl.load(squares + row, exists, 0.0)[:, None]
        measure = square - measure
        # NaN counts as near.
        if tl.max(tl.max((listed & ((measure >= 0.5 * square) == 0)).to(tl.int32), axis=1), axis=0) > 0:
            first_key = (memory * (2 * HEADS) + half_head).to(tl.int64) * SUBKEYS
            measure = exact_distances(q, keys, q_row, first_key, index, exists, measure, HALF, TOP_K, BLOCK_D)
    score = half_score(measure, IDW, EPS)
    score = tl.where((place < TOP_K)[None, :], score, float("-inf"))
    share = tl.exp(score - tl.max(score, axis=1)[:, None])
    share = share * (1.0 / tl.sum(share, axis=1))[:, None]
    tl.store(measures + entry, measure, listed)
    tl.store(probabilities + entry, share, listed)
    if STEP:
        use = (memory * 2 * SUBKEYS + half_head % 2 * SUBKEYS)[:, None] + index
        tl.atomic_add(uses + use, (share * use_scale).to(tl.int64), listed, sem="relaxed")


@triton.jit
def exact_distances(
    q, keys, q_row, first_key, index, exists, distance,
    HALF: tl.constexpr, TOP_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``distance`` (rows, columns), the first k columns replaced by |q_half - key|^2 of sub-keys ``index``, from the
    elements; four rows of keys are under way at a time."""
    d = tl.arange(0, BLOCK_D)
    place = tl.arange(0, index.shape[1])
    inside = exists[:, None] & (d < HALF)[None, :]
    q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], inside, 0.0)
    for first in range(0, TOP_K, 4):
        for next in tl.static_range(4):
            here = (place == first + next)[None, :]
            key_row = first_key + tl.sum(tl.where(here, index, 0), axis=1)
            key_tile = tl.load(keys + key_row[:, None] * HALF + d[None, :], inside, 0.0)
            square = tl.sum((q_tile - key_tile) * (q_tile - key_tile), axis=1)
            distance = tl.where(here, square[:, None], distance)
    return distance


@triton.jit
def half_score(measure, IDW: tl.constexpr, EPS: tl.constexpr):
    """Score of a sub-key from its measure: -log(eps + d) (``idw``), or the inner product itself."""
    if IDW:
        return -tl.log(EPS + measure)
    else:
        return measure


@triton.jit(do_not_specialize=["n_all"])
def combine_kernel(
    indices,  # (M,R,T,H,2,k) int32
    measures,  # (M,R,T,H,2,k)
    pairs,  # out (M,R,T,H*k) int32
    slots,  # out (M,R,T,H*k) int64
    weights,  # out (M,R,T,H*k)
    temperature,
    n_all,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = token < n_all
    place = tl.arange(0, BLOCK_K)
    sum_place = tl.arange(0, BLOCK_K * BLOCK_K)
    joint = tl.arange(0, BLOCK_J)
    dtype = measures.dtype.element_ty
    all_scores = tl.full((BLOCK_S, BLOCK_J), float("-inf"), dtype=dtype)
    all_slots = tl.zeros((BLOCK_S, BLOCK_J), dtype=tl.int32)
    all_pairs = tl.zeros((BLOCK_S, BLOCK_J), dtype=tl.int32)
    real = (sum_place // BLOCK_K < TOP_K) & (sum_place % BLOCK_K < TOP_K)
    listed = exists[:, None] & (place < TOP_K)[None, :]
    for head in range(HEADS):
        first = ((token * HEADS + head) * 2 * TOP_K)[:, None] + place[None, :]
        index1 = tl.load(indices + first, listed, 0)
        index2 = tl.load(indices + first + TOP_K, listed, 0)
        score1 = half_score(tl.load(measures + first, listed, 0.0), IDW, EPS)
        score2 = half_score(tl.load(measures + first + TOP_K, listed, 0.0), IDW, EPS)
        sums = tl.reshape(score1[:, :, None] + score2[:, None, :], (BLOCK_S, BLOCK_K * BLOCK_K))
        chosen = choose_best(in_order(sums), real, TOP_K, BLOCK_K)
        place1, place2 = chosen // BLOCK_K, chosen % BLOCK_K
        from1 = place1[:, :, None] == place[None, None, :]
        from2 = place2[:, :, None] == place[None, None, :]
        slot = tl.sum(tl.where(from1, index1[:, None, :], 0), axis=2) * SUBKEYS
        slot += tl.sum(tl.where(from2, index2[:, None, :], 0), axis=2)
        top_score = tl.sum(tl.where(from1, score1[:, None, :], 0.0), axis=2)
        top_score += tl.sum(tl.where(from2, score2[:, None, :], 0.0), axis=2)
        pair = place1 * TOP_K + place2
        here = (joint[:, None] == head * TOP_K + place[None, :]) & (place < TOP_K)[None, :]
        mine = (joint >= head * TOP_K) & (joint < (head + 1) * TOP_K)
        all_slots += tl.sum(tl.where(here[None, :, :], slot[:, None, :], 0), axis=2)
        all_pairs += tl.sum(tl.where(here[None, :, :], pair[:, None, :], 0), axis=2)
        head_scores = tl.sum(tl.where(here[None, :, :], top_score[:, None, :], 0.0), axis=2)
        all_scores = tl.where(mine[None, :], head_scores, all_scores)

    logits = all_scores / temperature
    share = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    entry = token[:, None] * (HEADS * TOP_K) + joint[None, :]
    chosen_here = exists[:, None] & (joint < HEADS * TOP_K)[None, :]
    tl.store(pairs + entry, all_pairs, chosen_here)
    tl.store(slots + entry, all_slots.to(tl.int64), chosen_here)
    tl.store(weights + entry, share / tl.sum(share, axis=1)[:, None], chosen_here)


def combine(
    indices: Tensor,
    measures: Tensor,
    pairs: Tensor,
    slots: Tensor,
    weights: Tensor,
    n_subkeys: int,
    score: str,
    temperature: float,
) -> None:
    """From the k best sub-keys of each half, (M,R,T,H,2,k), write the slots of all tokens and their weights.

    pairs (M,R,T,H*k) int32: the chosen sums of half scores, position1 * k + position2; equal sums: the lowest position.
    slots (M,R,T,H*k) int64. weights: softmax of scores / temperature over all H*k slots of a token.

    No token waits for another. Bytes per token: 16 H k in, 16 H k out. One warp holds four tokens of up to 8 sub-keys a
    half, or four warps one.
    """
    n_heads, top_k = indices.shape[3], indices.shape[5]
    block_k = triton.next_power_of_2(top_k)
    n_all = indices[..., 0, 0, 0].numel()
    block_s = 4 if block_k <= 8 else 1
    launch(
        combine_kernel,
        (triton.cdiv(n_all, block_s),),
        *(indices, measures, pairs, slots, weights, float(temperature), n_all),
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        TOP_K=top_k,
        IDW=score == "idw",
        EPS=IDW_EPS,
        BLOCK_S=block_s,
        BLOCK_K=block_k,
        BLOCK_J=triton.next_power_of_2(n_heads * top_k),
        num_warps=1 if block_k <= 8 else 4,
    )
