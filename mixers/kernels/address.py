"""The k best sub-keys of each half, their exact scores, the k best sums, and the joint softmax over a token's slots."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk, token_of
from mixers.kernels.launch import launch
from mixers.product_keys import IDW_EPS


@triton.jit
def choose_subkeys(
    ranks, rows, exists, SUBKEYS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Indices (BLOCK_R, BLOCK_K) of the k highest ranks of each row, best first; equal ranks: the lowest index."""
    subkey = tl.arange(0, BLOCK_N)
    place = tl.arange(0, BLOCK_K)
    real = (subkey < SUBKEYS)[None, :]
    order = tl.load(ranks + rows[:, None] * SUBKEYS + subkey[None, :], exists[:, None] & real, 0.0)
    # NaN is chosen first, so that it reaches the weights.
    order = tl.where(order == order, order, float("inf"))
    order = tl.where(real, order, float("-inf"))
    best = tl.zeros((rows.shape[0], BLOCK_K), dtype=tl.int32)
    for j in range(TOP_K):
        top = tl.minimum(tl.argmax(order, axis=1), SUBKEYS - 1)
        best = tl.where(place[None, :] == j, top[:, None], best)
        order = tl.where(subkey[None, :] == top[:, None], float("-inf"), order)
    return best


@triton.jit
def subkey_scores(
    q, keys, measures, probabilities, index, q_row, table, exists,
    HALF: tl.constexpr, TOP_K: tl.constexpr, IDW: tl.constexpr, EPS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores (BLOCK_R, BLOCK_K) of the sub-keys ``index`` of each row; stores measures and their softmax."""
    place = tl.arange(0, BLOCK_K)
    listed = exists[:, None] & (place < TOP_K)[None, :]
    entry = q_row[:, None] * TOP_K + place[None, :]
    measure = tl.zeros((BLOCK_R, BLOCK_K), dtype=q.dtype.element_ty)
    for first in range(0, HALF, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], exists[:, None] & (d < HALF)[None, :], 0.0)
        inside = listed[:, :, None] & (d < HALF)[None, None, :]
        key_tile = tl.load(keys + (table[:, None] + index)[:, :, None] * HALF + d[None, None, :], inside, 0.0)
        if IDW:
            difference = tl.where(inside, q_tile[:, None, :] - key_tile, 0.0)
            measure += tl.sum(difference * difference, axis=2)
        else:
            measure += tl.sum(q_tile[:, None, :] * key_tile, axis=2)
    if IDW:
        score = -tl.log(EPS + measure)
    else:
        score = measure
    score = tl.where((place < TOP_K)[None, :], score, float("-inf"))
    share = tl.exp(score - tl.max(score, axis=1)[:, None])
    tl.store(measures + entry, measure, listed)
    tl.store(probabilities + entry, share / tl.sum(share, axis=1)[:, None], listed)
    return score


@triton.jit
def split_halves(both, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr):
    """(2 BLOCK_S, BLOCK_K), the halves of a query one after the other, as two of (BLOCK_S, BLOCK_K)."""
    return tl.split(tl.permute(tl.reshape(both, (BLOCK_S, 2, BLOCK_K)), (0, 2, 1)))


@triton.jit(do_not_specialize=["n_rows", "n_chunk", "n_tokens", "start"])
def address_kernel(
    q,  # (M,R,T,H,K)
    keys,  # (M,H,2,n,K/2)
    ranks,  # (M,S,H,2,n)
    indices,  # out (M,R,T,H,2,k) int32
    measures,  # out (M,R,T,H,2,k)
    probabilities,  # out (M,R,T,H,2,k)
    pairs,  # out (M,R,T,H*k) int32
    slots,  # out (M,R,T,H*k) int64
    weights,  # out (M,R,T,H*k)
    temperature,
    n_rows,
    n_chunk,
    n_tokens,
    start,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    HALF: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    EPS: tl.constexpr,
    JOINT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    memory = tl.program_id(1)
    n_queries = n_rows * n_chunk
    query = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = query < n_queries
    token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
    # Both halves of a query in one tile: two chains of comparisons run side by side.
    both = tl.arange(0, 2 * BLOCK_S)
    row_query = tl.program_id(0) * BLOCK_S + both // 2
    row_exists = row_query < n_queries
    row_token = token_of(row_query, memory, n_rows, n_chunk, n_tokens, start)
    half = both % 2
    place = tl.arange(0, BLOCK_K)
    sum_place = tl.arange(0, BLOCK_K * BLOCK_K)
    joint = tl.arange(0, BLOCK_J)
    all_scores = tl.full((BLOCK_S, BLOCK_J), float("-inf"), dtype=q.dtype.element_ty)
    all_slots = tl.zeros((BLOCK_S, BLOCK_J), dtype=tl.int32)
    all_pairs = tl.zeros((BLOCK_S, BLOCK_J), dtype=tl.int32)
    for head in range(HEADS):
        rank_row = ((memory.to(tl.int64) * n_queries + row_query) * HEADS + head) * 2 + half
        index = choose_subkeys(ranks, rank_row, row_exists, SUBKEYS, TOP_K, BLOCK_N, BLOCK_K)
        q_row = (row_token * HEADS + head) * 2 + half
        listed = row_exists[:, None] & (place < TOP_K)[None, :]
        tl.store(indices + q_row[:, None] * TOP_K + place[None, :], index, listed)
        table = ((memory * HEADS + head).to(tl.int64) * 2 + half) * SUBKEYS
        score = subkey_scores(
            q, keys, measures, probabilities, index, q_row, table, row_exists,
            HALF, TOP_K, IDW, EPS, 2 * BLOCK_S, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        index1, index2 = split_halves(index, BLOCK_S, BLOCK_K)
        score1, score2 = split_halves(score, BLOCK_S, BLOCK_K)
        sums = tl.reshape(score1[:, :, None] + score2[:, None, :], (BLOCK_S, BLOCK_K * BLOCK_K))
        order = tl.where(sums == sums, sums, float("inf"))
        real = (sum_place // BLOCK_K < TOP_K) & (sum_place % BLOCK_K < TOP_K)
        order = tl.where(real[None, :], order, float("-inf"))
        chosen = tl.zeros((BLOCK_S, BLOCK_K), dtype=tl.int32)
        for j in range(TOP_K):
            top = tl.argmax(order, axis=1)
            chosen = tl.where(place[None, :] == j, top[:, None], chosen)
            order = tl.where(sum_place[None, :] == top[:, None], float("-inf"), order)
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

    if JOINT:
        logits = all_scores / temperature
        share = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        weight = share / tl.sum(share, axis=1)[:, None]
    else:
        weight = tl.zeros((BLOCK_S, BLOCK_J), dtype=q.dtype.element_ty)
        for head in range(HEADS):
            mine = (joint >= head * TOP_K) & (joint < (head + 1) * TOP_K)
            logits = tl.where(mine[None, :], all_scores / temperature, float("-inf"))
            share = tl.exp(logits - tl.max(logits, axis=1)[:, None])
            weight += share / tl.sum(share, axis=1)[:, None]
    entry = token[:, None] * (HEADS * TOP_K) + joint[None, :]
    listed = exists[:, None] & (joint < HEADS * TOP_K)[None, :]
    tl.store(pairs + entry, all_pairs, listed)
    tl.store(slots + entry, all_slots.to(tl.int64), listed)
    tl.store(weights + entry, weight, listed)


def address(
    q: Tensor,
    keys: Tensor,
    ranks: Tensor,
    indices: Tensor,
    measures: Tensor,
    probabilities: Tensor,
    pairs: Tensor,
    slots: Tensor,
    weights: Tensor,
    chunk: Chunk,
    score: str,
    temperature: float,
    *,
    joint: bool = True,
) -> None:
    """From the ranks (M,S,H,2,n) of a chunk's queries, write the chunk's part of the other tensors.

    indices (M,R,T,H,2,k) int32: the k sub-keys of highest rank, best first; equal ranks: the lowest index.
    measures (M,R,T,H,2,k): |q_half - key|^2 (``idw``) or <q_half, key> (``dot``), from the differences themselves.
    probabilities: softmax of the half's k scores. pairs (M,R,T,H*k): the chosen sums, position1 * k + position2.
    slots (M,R,T,H*k) int64. weights: softmax of scores / temperature over all H*k slots of a token (``joint``), or
    over each head's k. Equal sums: the lowest position.

    Bytes per token: 2 H n ranks, 2 H k K/2 key elements (both from the L2 cache) and H K of q. One warp holds a query,
    so that no maximum crosses warps.
    """
    n_heads, n_subkeys, half_dim = keys.shape[1], keys.shape[3], keys.shape[4]
    top_k = indices.shape[-1]
    block_k = triton.next_power_of_2(top_k)
    launch(
        address_kernel,
        (chunk.n_queries, chunk.n_memories),
        *(q, keys, ranks, indices, measures, probabilities, pairs, slots, weights, float(temperature), *chunk.sizes),
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        HALF=half_dim,
        TOP_K=top_k,
        IDW=score == "idw",
        EPS=IDW_EPS,
        JOINT=joint,
        BLOCK_S=1,
        BLOCK_N=triton.next_power_of_2(n_subkeys),
        BLOCK_D=max(16, min(1024 // block_k, triton.next_power_of_2(half_dim))),
        BLOCK_K=block_k,
        BLOCK_J=triton.next_power_of_2(n_heads * top_k),
        num_warps=1 if block_k <= 8 else 4,
    )
