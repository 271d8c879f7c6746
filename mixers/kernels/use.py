"""How much each sub-key is used by a chunk: a weighted histogram in a fixed order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk, token_of
from mixers.kernels.launch import launch

BLOCK_N, BLOCK_E = 32, 256
QUERIES_PER_PART, MAX_PARTS = 128, 16


@triton.jit(do_not_specialize=["n_rows", "n_chunk", "n_tokens", "start", "n_split"])
def mean_use_kernel(
    indices,  # (M,R,T,H,2,k) int32
    shares,  # (M,R,T,H,2,k)
    partial,  # scratch (P,M,2,n)
    arrived,  # scratch (M,2,n / BLOCK_N) int32, zero before and after
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
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    half = tl.program_id(1) % 2
    memory = tl.program_id(1) // 2
    part = tl.program_id(2)
    n_queries = n_rows * n_chunk
    subkey = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = shares.dtype.element_ty
    total = tl.zeros((BLOCK_N,), dtype=dtype)
    begin = part * n_split * HEADS * TOP_K
    end = tl.minimum((part + 1) * n_split, n_queries) * HEADS * TOP_K
    for step in range(STEPS):
        element = begin + step * BLOCK_E + tl.arange(0, BLOCK_E)
        query = element // (HEADS * TOP_K)
        head = element // TOP_K % HEADS
        token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
        entry = ((token * HEADS + head) * 2 + half) * TOP_K + element % TOP_K
        index = tl.load(indices + entry, element < end, -1)
        share = tl.load(shares + entry, element < end, 0.0)
        total += tl.sum(tl.where(index[:, None] == subkey[None, :], share[:, None], 0.0), axis=0)
    real = subkey < SUBKEYS
    row = tl.program_id(1) * SUBKEYS + subkey
    tl.store(partial + part * tl.num_programs(1) * SUBKEYS + row, total, real)
    # The last program to arrive adds the parts in their order, whichever it is: all others' stores come before the
    # counter's release, and its loads, past the L1 cache, after the counter's acquire.
    tl.debug_barrier()
    counter = arrived + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    n_before = tl.atomic_add(counter, 1, sem="acq_rel")
    if n_before == PARTS - 1:
        tl.debug_barrier()
        total = tl.zeros((BLOCK_N,), dtype=dtype)
        for p in range(PARTS):
            offset = p * tl.num_programs(1) * SUBKEYS
            total += tl.load(partial + offset + row, real, 0.0, cache_modifier=".cg")
        tl.store(mean + row, total / (n_queries * HEADS), real)
        tl.store(counter, 0)


class UseParts(NamedTuple):
    """Scratch of :func:`mean_use`: the sums of each part of the queries, and how many parts have arrived."""

    partial: Tensor
    arrived: Tensor


def use_parts(mean: Tensor, n_queries: int) -> UseParts:
    """Scratch for means (M,2,n) of chunks of up to ``n_queries`` a memory."""
    n_blocks = mean.shape[0] * 2 * triton.cdiv(mean.shape[2], BLOCK_N)
    return UseParts(mean.new_empty(_n_parts(n_queries), *mean.shape), mean.new_zeros(n_blocks, dtype=torch.int32))


def _n_parts(n_queries: int) -> int:
    return min(MAX_PARTS, triton.cdiv(n_queries, QUERIES_PER_PART))


def mean_use(indices: Tensor, shares: Tensor, parts: UseParts, mean: Tensor, chunk: Chunk) -> None:
    """mean (M,2,n) = sum of the shares of the chunk's token-heads that list sub-key i, over S*H.

    Bytes: the chunk's indices and shares, 16 S H k, once per BLOCK_N sub-keys (from the L2 cache). Every program
    compares its part's shares with its BLOCK_N sub-keys: 2 n S H k comparisons in all.
    """
    n_heads, top_k = indices.shape[3], indices.shape[5]
    n_subkeys = mean.shape[-1]
    n_parts = _n_parts(chunk.n_queries)
    n_split = triton.cdiv(chunk.n_queries, n_parts)
    launch(
        mean_use_kernel,
        (triton.cdiv(n_subkeys, BLOCK_N), 2 * chunk.n_memories, n_parts),
        *(indices, shares, *parts, mean, *chunk.sizes, n_split),
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        TOP_K=top_k,
        PARTS=n_parts,
        STEPS=triton.cdiv(n_split * n_heads * top_k, BLOCK_E),
        BLOCK_N=BLOCK_N,
        BLOCK_E=BLOCK_E,
        num_warps=4,
    )
