"""How much each sub-key is used by a chunk, and by which queries: a weighted histogram and lists, in a fixed order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk, token_of
from mixers.kernels.launch import launch

BLOCK_N, BLOCK_S = 32, 32
QUERIES_PER_PART, MAX_PARTS = 64, 16


@triton.jit(do_not_specialize=["n_rows", "n_chunk", "n_tokens", "start", "n_split"])
def mean_use_kernel(
    indices,  # (M,R,T,H,2,k) int32
    shares,  # (M,R,T,H,2,k)
    partial,  # scratch (P,M,2,n)
    arrived,  # scratch (M,2,n / BLOCK_N) int32, zero before and after
    listing,  # out (M,H,2,n,P,S/P) int32
    counts,  # out (M,H,2,n,P) int32
    mean,  # out (M,2,n)
    n_rows,
    n_chunk,
    n_tokens,
    start,
    n_split,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    half = tl.program_id(1) % 2
    memory = tl.program_id(1) // 2
    part = tl.program_id(2)
    n_queries = n_rows * n_chunk
    subkey = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = subkey < SUBKEYS
    dtype = shares.dtype.element_ty
    used = tl.zeros((BLOCK_S, BLOCK_N), dtype=dtype)
    begin = part * n_split
    end = tl.minimum(begin + n_split, n_queries)
    for head in range(HEADS):
        list_row = (((memory * HEADS + head) * 2 + half).to(tl.int64) * SUBKEYS + subkey) * PARTS + part
        n_listed = tl.zeros((BLOCK_N,), dtype=tl.int32)
        for step in range(STEPS):
            query = begin + step * BLOCK_S + tl.arange(0, BLOCK_S)
            exists = query < end
            token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
            entry = ((token * HEADS + head) * 2 + half) * TOP_K
            # 1 + the place of the sub-key in the query's list of k; a query lists a sub-key once.
            place = tl.zeros((BLOCK_S, BLOCK_N), dtype=tl.int32)
            for j in tl.range(0, TOP_K, loop_unroll_factor=4):
                index = tl.load(indices + entry + j, exists, -1)
                share = tl.load(shares + entry + j, exists, 0.0)
                lists = index[:, None] == subkey[None, :]
                used += tl.where(lists, share[:, None], 0.0)
                place = tl.where(lists, j + 1, place)
            listed = (place > 0).to(tl.int32)
            position = n_listed[None, :] + tl.cumsum(listed, axis=0) - 1
            access = query[:, None] * TOP_K + place - 1
            tl.store(listing + (list_row * n_split)[None, :] + position, access, place > 0)
            n_listed += tl.sum(listed, axis=0)
        tl.store(counts + list_row, n_listed, real)
    row = tl.program_id(1) * SUBKEYS + subkey
    tl.store(partial + part * tl.num_programs(1) * SUBKEYS + row, tl.sum(used, axis=0), real)
    # The last program to arrive adds the parts in their order, whichever it is: all others' stores come before the
    # counter's release, and its loads, past the L1 cache, after the counter's acquire.
    tl.debug_barrier()
    counter = arrived + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    n_before = tl.atomic_add(counter, 1, sem="acq_rel")
    if n_before == PARTS - 1:
        tl.debug_barrier()
        p = tl.arange(0, BLOCK_P)
        offset = (p * tl.num_programs(1) * SUBKEYS)[:, None] + row[None, :]
        inside = (p < PARTS)[:, None] & real[None, :]
        total = tl.sum(tl.load(partial + offset, inside, 0.0, cache_modifier=".cg"), axis=0)
        tl.store(mean + row, total / (n_queries * HEADS), real)
        tl.store(counter, 0)


class Uses(NamedTuple):
    """What :func:`mean_use` finds beside the means, over P parts of a chunk's queries, and its scratch.

    partial (P,M,2,n): sums of the parts. arrived: how many parts have arrived. listing (M,H,2,n,P,ceil(S/P)) int32: the
    accesses query * k + place that list each sub-key, in the order of the queries; counts (M,H,2,n,P) int32 of them.
    Both are filled from the front: a chunk with fewer queries or parts uses less.
    """

    partial: Tensor
    arrived: Tensor
    listing: Tensor
    counts: Tensor


def uses(indices: Tensor, mean: Tensor, n_queries: int) -> Uses:
    """Room for indices (M,R,T,H,2,k), means (M,2,n) and chunks of up to ``n_queries`` a memory: 8 H n S bytes."""
    n_parts, n_split = parts_of(n_queries)
    n_blocks = mean.shape[0] * 2 * triton.cdiv(mean.shape[2], BLOCK_N)
    n_lists = mean.numel() * indices.shape[3]

    def whole(size: int, n_rows: int = 1) -> Tensor:
        return torch.empty(n_rows * size, dtype=torch.int32, device=mean.device)

    return Uses(
        mean.new_empty(n_parts, *mean.shape),
        mean.new_zeros(n_blocks, dtype=torch.int32),
        whole(n_parts * n_split, n_lists),
        whole(n_parts, n_lists),
    )


def parts_of(n_queries: int) -> tuple[int, int]:
    """Parts P of a chunk's queries, and queries in each but the last: P * n_split never falls with ``n_queries``."""
    n_parts = min(MAX_PARTS, triton.cdiv(n_queries, QUERIES_PER_PART))
    return n_parts, triton.cdiv(n_queries, n_parts)


def mean_use(indices: Tensor, shares: Tensor, found: Uses, mean: Tensor, chunk: Chunk) -> None:
    """mean (M,2,n) = sum of the shares of the chunk's token-heads that list sub-key i, over S*H; and who they are.

    Bytes: the chunk's indices and shares, 16 S H k, once per BLOCK_N sub-keys (from the L2 cache), and 8 S H k of lists
    out. Every program compares its part's shares with its BLOCK_N sub-keys: 2 n S H k comparisons in all.
    """
    n_heads, top_k = indices.shape[3], indices.shape[5]
    n_subkeys = mean.shape[-1]
    n_parts, n_split = parts_of(chunk.n_queries)
    launch(
        mean_use_kernel,
        (triton.cdiv(n_subkeys, BLOCK_N), 2 * chunk.n_memories, n_parts),
        *(indices, shares, *found, mean, *chunk.sizes, n_split),
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        TOP_K=top_k,
        PARTS=n_parts,
        STEPS=triton.cdiv(n_split, BLOCK_S),
        BLOCK_P=triton.next_power_of_2(n_parts),
        BLOCK_N=BLOCK_N,
        BLOCK_S=BLOCK_S,
        num_warps=4,
    )
