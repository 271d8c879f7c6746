"""How much each sub-key is used by a chunk: a weighted histogram in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk, token_of


@triton.jit(do_not_specialize=["n_rows", "n_chunk", "n_tokens", "start"])
def mean_use_kernel(
    indices,  # (M,R,T,H,2,k) int32
    shares,  # (M,R,T,H,2,k)
    mean,  # out (M,2,n)
    n_rows,
    n_chunk,
    n_tokens,
    start,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    half = tl.program_id(1)
    memory = tl.program_id(2)
    subkey = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=shares.dtype.element_ty)
    for first in range(0, QUERIES * HEADS * TOP_K, BLOCK_E):
        element = first + tl.arange(0, BLOCK_E)
        query = element // (HEADS * TOP_K)
        head = element // TOP_K % HEADS
        token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
        entry = ((token * HEADS + head) * 2 + half) * TOP_K + element % TOP_K
        index = tl.load(indices + entry, query < QUERIES, -1)
        share = tl.load(shares + entry, query < QUERIES, 0.0)
        total += tl.sum(tl.where(index[:, None] == subkey[None, :], share[:, None], 0.0), axis=0)
    mean_row = (memory * 2 + half) * SUBKEYS
    tl.store(mean + mean_row + subkey, total / (QUERIES * HEADS), subkey < SUBKEYS)


def mean_use(indices: Tensor, shares: Tensor, mean: Tensor, chunk: Chunk) -> None:
    """mean (M,2,n) = sum of the shares of the chunk's token-heads that list sub-key i, over S*H.

    Bytes: the chunk's indices and shares, 16 S H k, once per BLOCK_N sub-keys (from the L2 cache). Every program
    compares every share with its BLOCK_N sub-keys: 2 n S H k operations in all.
    """
    n_heads, top_k = indices.shape[3], indices.shape[5]
    n_subkeys = mean.shape[-1]
    block_n = 8
    n_elements = chunk.n_queries * n_heads * top_k
    mean_use_kernel[(triton.cdiv(n_subkeys, block_n), 2, chunk.n_memories)](
        indices,
        shares,
        mean,
        chunk.n_rows,
        chunk.n_chunk,
        chunk.n_tokens,
        chunk.start,
        QUERIES=chunk.n_queries,
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        TOP_K=top_k,
        BLOCK_N=block_n,
        BLOCK_E=2048 if n_elements >= 2048 else 256,
        num_warps=8 if n_elements >= 2048 else 4,
    )
