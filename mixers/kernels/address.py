"""Exact scores of the chosen sub-keys, the k best sums of two halves, and the joint softmax over a token's slots."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk, token_of
from mixers.product_keys import IDW_EPS


@triton.jit
def half_scores(
    q, keys, indices, measures, probabilities, q_row, table, exists,
    HALF: tl.constexpr, TOP_K: tl.constexpr, IDW: tl.constexpr, EPS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sub-key indices and scores (BLOCK_S, BLOCK_K) of one half; stores measures and their softmax."""
    place = tl.arange(0, BLOCK_K)
    listed = exists[:, None] & (place < TOP_K)[None, :]
    entry = q_row[:, None] * TOP_K + place[None, :]
    index = tl.load(indices + entry, listed, 0)
    measure = tl.zeros((BLOCK_S, BLOCK_K), dtype=q.dtype.element_ty)
    for first in range(0, HALF, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], exists[:, None] & (d < HALF)[None, :], 0.0)
        inside = listed[:, :, None] & (d < HALF)[None, None, :]
        key_tile = tl.load(keys + (table + index)[:, :, None] * HALF + d[None, None, :], inside, 0.0)
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
    return index, score


@triton.jit(do_not_specialize=["n_rows", "n_chunk", "n_tokens", "start"])
def address_kernel(
    q,  # (M,R,T,H,K)
    keys,  # (M,H,2,n,K/2)
    indices,  # (M,R,T,H,2,k) int32
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
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    memory = tl.program_id(1)
    query = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = query < n_rows * n_chunk
    token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
    place = tl.arange(0, BLOCK_K)
    sum_place = tl.arange(0, BLOCK_K * BLOCK_K)
    joint = tl.arange(0, BLOCK_J)
    all_scores = tl.full((BLOCK_S, BLOCK_J), float("-inf"), dtype=q.dtype.element_ty)
    all_slots = tl.zeros((BLOCK_S, BLOCK_J), dtype=tl.int32)
    all_pairs = tl.zeros((BLOCK_S, BLOCK_J), dtype=tl.int32)
    for head in range(HEADS):
        q_row = (token * HEADS + head) * 2
        table = (memory * HEADS + head).to(tl.int64) * 2 * SUBKEYS
        index1, score1 = half_scores(
            q, keys, indices, measures, probabilities, q_row, table, exists,
            HALF, TOP_K, IDW, EPS, BLOCK_S, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        index2, score2 = half_scores(
            q, keys, indices, measures, probabilities, q_row + 1, table + SUBKEYS, exists,
            HALF, TOP_K, IDW, EPS, BLOCK_S, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        sums = tl.reshape(score1[:, :, None] + score2[:, None, :], (BLOCK_S, BLOCK_K * BLOCK_K))
        order = tl.where(sums == sums, sums, float("inf"))
        real = (sum_place // BLOCK_K < TOP_K) & (sum_place % BLOCK_K < TOP_K)
        order = tl.where(real[None, :], order, float("-inf"))
        for j in range(TOP_K):
            top = tl.argmax(order, axis=1)
            chosen = sum_place[None, :] == top[:, None]
            order = tl.where(chosen, float("-inf"), order)
            top_score = tl.sum(tl.where(chosen, sums, 0.0), axis=1)
            place1, place2 = top // BLOCK_K, top % BLOCK_K
            first = tl.sum(tl.where(place[None, :] == place1[:, None], index1, 0), axis=1)
            second = tl.sum(tl.where(place[None, :] == place2[:, None], index2, 0), axis=1)
            here = joint[None, :] == head * TOP_K + j
            all_scores = tl.where(here, top_score[:, None], all_scores)
            all_slots = tl.where(here, (first * SUBKEYS + second)[:, None], all_slots)
            all_pairs = tl.where(here, (place1 * TOP_K + place2)[:, None], all_pairs)

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
    """From the chosen sub-keys (M,R,T,H,2,k), write the chunk's part of the other tensors.

    measures (M,R,T,H,2,k): |q_half - key|^2 (``idw``) or <q_half, key> (``dot``), from the differences themselves.
    probabilities: softmax of the half's k scores. pairs (M,R,T,H*k): the chosen sums, position1 * k + position2.
    slots (M,R,T,H*k) int64. weights: softmax of scores / temperature over all H*k slots of a token (``joint``), or
    over each head's k. Equal sums: the lowest position.

    Bytes per token: 2 H k K/2 key elements (from the L2 cache) and H K of q.
    """
    n_heads, n_subkeys, half_dim = keys.shape[1], keys.shape[3], keys.shape[4]
    top_k = indices.shape[-1]
    block_k = triton.next_power_of_2(top_k)
    block_s = max(1, min(4, 1024 // block_k**2))
    address_kernel[(triton.cdiv(chunk.n_queries, block_s), chunk.n_memories)](
        q,
        keys,
        indices,
        measures,
        probabilities,
        pairs,
        slots,
        weights,
        temperature,
        chunk.n_rows,
        chunk.n_chunk,
        chunk.n_tokens,
        chunk.start,
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        HALF=half_dim,
        TOP_K=top_k,
        IDW=score == "idw",
        EPS=IDW_EPS,
        JOINT=joint,
        BLOCK_S=block_s,
        BLOCK_D=min(128, triton.next_power_of_2(half_dim)),
        BLOCK_K=block_k,
        BLOCK_J=triton.next_power_of_2(n_heads * top_k),
        num_warps=4,
    )
