"""The k best sub-keys of each half, their exact scores, the k best sums, and the softmax over a token's slots."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.launch import launch
from mixers.kernels.select import choose_best, in_order
from mixers.product_keys import IDW_EPS


@triton.jit
def half_query(row, n_queries, n_rows, n_chunk, n_tokens, start, HEADS: tl.constexpr):
    """Of rows (m*S + s)*2H + 2h + half of a chunk: their row among those of the call, memory, query, 2h + half."""
    half_head = row % (2 * HEADS)
    query = row // (2 * HEADS) % n_queries
    memory = row // (2 * HEADS) // n_queries
    sequence = memory.to(tl.int64) * n_rows + query // n_chunk
    token = sequence * n_tokens + start + query % n_chunk
    return token * (2 * HEADS) + half_head, memory, query, half_head


@triton.jit
def address_rows(
    row, q, keys, ranks, indices, measures, probabilities, places, n_rows_all, n_queries, n_most,
    n_rows, n_chunk, n_tokens, start,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, TOP_K: tl.constexpr,
    IDW: tl.constexpr, EPS: tl.constexpr, LIST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of half queries ``row``: the k sub-keys of highest rank, their exact measures and the softmax of their scores.

    indices (M,R,T,H,2,k) int32, best first; equal ranks: the lowest index. measures: |q_half - key|^2 (``idw``) or
    <q_half, key> (``dot``), from the elements themselves. With LIST, 1 + place in the list of k goes to ``places``
    (M,H,2,n,n_most) int8, for :func:`mixers.kernels.use.list_uses`.

    Bytes per token: 2 H n ranks, 2 H k K/2 key elements (both from the L2 cache) and H K of q.
    """
    exists = row < n_rows_all
    q_row, memory, query, half_head = half_query(row, n_queries, n_rows, n_chunk, n_tokens, start, HEADS)
    subkey = tl.arange(0, BLOCK_N)
    place = tl.arange(0, BLOCK_K)
    real = subkey < SUBKEYS
    rank = tl.load(ranks + row.to(tl.int64)[:, None] * SUBKEYS + subkey[None, :], exists[:, None] & real[None, :], 0.0)
    index = choose_best(in_order(rank), real, TOP_K, BLOCK_K)
    listed = exists[:, None] & (place < TOP_K)[None, :]
    entry = q_row[:, None] * TOP_K + place[None, :]
    tl.store(indices + entry, index, listed)
    key_row = (memory * (2 * HEADS) + half_head).to(tl.int64)[:, None] * SUBKEYS + index
    if LIST:
        tl.store(places + key_row * n_most + query[:, None], (place + 1).to(tl.int8)[None, :], listed)

    measure = tl.zeros(index.shape, dtype=q.dtype.element_ty)
    for first in range(0, HALF, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], exists[:, None] & (d < HALF)[None, :], 0.0)
        inside = listed[:, :, None] & (d < HALF)[None, None, :]
        key_tile = tl.load(keys + key_row[:, :, None] * HALF + d[None, None, :], inside, 0.0)
        if IDW:
            difference = tl.where(inside, q_tile[:, None, :] - key_tile, 0.0)
            measure += tl.sum(difference * difference, axis=2)
        else:
            measure += tl.sum(q_tile[:, None, :] * key_tile, axis=2)
    score = half_score(measure, IDW, EPS)
    score = tl.where((place < TOP_K)[None, :], score, float("-inf"))
    share = tl.exp(score - tl.max(score, axis=1)[:, None])
    tl.store(measures + entry, measure, listed)
    tl.store(probabilities + entry, share / tl.sum(share, axis=1)[:, None], listed)


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

    No token waits for another. Bytes per token: 16 H k in, 16 H k out. One warp holds a token.
    """
    n_heads, top_k = indices.shape[3], indices.shape[5]
    block_k = triton.next_power_of_2(top_k)
    n_all = indices[..., 0, 0, 0].numel()
    launch(
        combine_kernel,
        (n_all,),
        *(indices, measures, pairs, slots, weights, float(temperature), n_all),
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        TOP_K=top_k,
        IDW=score == "idw",
        EPS=IDW_EPS,
        BLOCK_S=1,
        BLOCK_K=block_k,
        BLOCK_J=triton.next_power_of_2(n_heads * top_k),
        num_warps=1 if block_k <= 8 else 4,
    )
