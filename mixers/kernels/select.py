"""Ranks of all sub-keys for each half of each query: what the k best are chosen by."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk, token_of
from mixers.kernels.launch import launch


@triton.jit(do_not_specialize=["n_rows", "n_chunk", "n_tokens", "start"])
def rank_subkeys_kernel(
    q,  # (M,R,T,H,K)
    keys,  # (M,H,2,n,K/2)
    ranks,  # out (M,S,H,2,n)
    n_rows,
    n_chunk,
    n_tokens,
    start,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    HALF: tl.constexpr,
    IDW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    half_head = tl.program_id(2) % (2 * HEADS)
    memory = tl.program_id(2) // (2 * HEADS)
    n_queries = n_rows * n_chunk
    query = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = query < n_queries
    token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
    q_row = token * (2 * HEADS) + half_head
    subkey = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = subkey < SUBKEYS
    table = tl.program_id(2).to(tl.int64) * SUBKEYS
    dtype = q.dtype.element_ty

    rank = tl.zeros((BLOCK_S, BLOCK_N), dtype=dtype)
    squares = tl.zeros((BLOCK_N, BLOCK_D), dtype=dtype)
    for first in range(0, HALF, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        inside = d < HALF
        q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], exists[:, None] & inside[None, :], 0.0)
        key_tile = tl.load(keys + (table + subkey)[:, None] * HALF + d[None, :], real[:, None] & inside[None, :], 0.0)
        if IDW:
            squares += key_tile * key_tile
        rank = tl.dot(q_tile, tl.trans(key_tile), rank, input_precision="tf32x3", out_dtype=dtype)
    # |q|^2 is the same for all sub-keys of a query: it does not change the order.
    if IDW:
        rank = 2 * rank - tl.sum(squares, axis=1)[None, :]
    row = (memory.to(tl.int64) * n_queries + query) * (2 * HEADS) + half_head
    tl.store(ranks + row[:, None] * SUBKEYS + subkey[None, :], rank, exists[:, None] & real[None, :])


def rank_subkeys(q: Tensor, keys: Tensor, ranks: Tensor, chunk: Chunk, score: str) -> None:
    """Write the rank of every sub-key for the chunk's queries, ``ranks`` (M,S,H,2,n), scratch: the higher, the nearer.

    ``idw``: 2<q,key> - |key|^2, ``dot``: <q,key>, both from three tf32 products, accurate to about 2^-21 of |q| |key|.

    Bytes per chunk: M S H 2 n ranks out; q once per BLOCK_N sub-keys and the keys once per BLOCK_S queries (from the
    L2 cache). 2 M S H n K operations, three times over on tensor cores.
    """
    n_memories, n_heads, _, n_subkeys, half_dim = keys.shape
    block_s, block_n, num_warps = rank_tile(chunk, n_heads, n_subkeys)
    launch(
        rank_subkeys_kernel,
        (triton.cdiv(chunk.n_queries, block_s), triton.cdiv(n_subkeys, block_n), n_memories * n_heads * 2),
        *(q, keys, ranks, *chunk.sizes),
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        HALF=half_dim,
        IDW=score == "idw",
        BLOCK_S=block_s,
        BLOCK_N=block_n,
        BLOCK_D=32 if half_dim > 16 else 16,
        num_warps=num_warps,
        num_stages=3,
    )


def rank_tile(chunk: Chunk, n_heads: int, n_subkeys: int) -> tuple[int, int, int]:
    """Queries and sub-keys of a tile, and its warps: tensor cores like 64 x 128, but a small chunk needs programs."""
    n_rows = chunk.n_memories * chunk.n_queries * n_heads * 2
    if n_subkeys <= 32:
        return 32, max(16, triton.next_power_of_2(n_subkeys)), 4
    return (64, 128, 4) if n_rows * n_subkeys >= 2**21 and n_subkeys > 64 else (32, 64, 4)
