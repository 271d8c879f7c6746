"""The k best sub-keys of each half of each query."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk, token_of


@triton.jit(do_not_specialize=["n_rows", "n_chunk", "n_tokens", "start"])
def select_halves_kernel(
    q,  # (M,R,T,H,K)
    keys,  # (M,H,2,n,K/2)
    indices,  # out (M,R,T,H,2,k) int32
    n_rows,
    n_chunk,
    n_tokens,
    start,
    HEADS: tl.constexpr,
    SUBKEYS: tl.constexpr,
    HALF: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    half = tl.program_id(1) % 2
    head = tl.program_id(1) // 2 % HEADS
    memory = tl.program_id(1) // (2 * HEADS)
    query = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = query < n_rows * n_chunk
    token = token_of(query, memory, n_rows, n_chunk, n_tokens, start)
    q_row = (token * HEADS + head) * 2 + half
    table = ((memory * HEADS + head) * 2 + half).to(tl.int64) * SUBKEYS

    subkey = tl.arange(0, BLOCK_N)
    dots = tl.zeros((BLOCK_S, BLOCK_N), dtype=q.dtype.element_ty)
    norms = tl.zeros((BLOCK_N,), dtype=q.dtype.element_ty)
    for first in range(0, HALF, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        q_tile = tl.load(q + q_row[:, None] * HALF + d[None, :], exists[:, None] & (d < HALF)[None, :], 0.0)
        inside = (subkey < SUBKEYS)[:, None] & (d < HALF)[None, :]
        key_tile = tl.load(keys + (table + subkey[:, None]) * HALF + d[None, :], inside, 0.0)
        norms += tl.sum(key_tile * key_tile, axis=1)
        dots = tl.dot(q_tile, tl.trans(key_tile), dots, input_precision="tf32x3", out_dtype=dots.dtype)

    # |q|^2 is the same for all sub-keys of a query: it does not change the order.
    order = dots
    if IDW:
        order = 2 * dots - norms[None, :]
    # NaN is chosen first, so that it reaches the weights.
    order = tl.where(order == order, order, float("inf"))
    order = tl.where((subkey < SUBKEYS)[None, :], order, float("-inf"))
    place = tl.arange(0, BLOCK_K)
    best = tl.zeros((BLOCK_S, BLOCK_K), dtype=tl.int32)
    for j in range(TOP_K):
        top = tl.minimum(tl.argmax(order, axis=1), SUBKEYS - 1)
        best = tl.where(place[None, :] == j, top[:, None], best)
        order = tl.where(subkey[None, :] == top[:, None], float("-inf"), order)
    out = indices + q_row[:, None] * TOP_K + place[None, :]
    tl.store(out, best, exists[:, None] & (place < TOP_K)[None, :])


def select_halves(q: Tensor, keys: Tensor, indices: Tensor, chunk: Chunk, score: str) -> None:
    """Write the chunk's part of ``indices`` (M,R,T,H,2,k) int32: the k best sub-keys of each half, best first.

    ``idw`` ranks by 2<q,key> - |key|^2, ``dot`` by <q,key>, both from three tf32 products, accurate to about 2^-21 of
    |q| |key|; the chosen are scored again in full precision by ``address_kernel``. Equal ranks: the lowest index.

    Bytes per chunk: M S K q + M H n K keys for every BLOCK_S queries (from the L2 cache); 2 M S H n K operations, three
    times over on tensor cores.
    """
    n_heads, n_subkeys, half_dim = keys.shape[1], keys.shape[3], keys.shape[4]
    top_k = indices.shape[-1]
    block_n = max(16, triton.next_power_of_2(n_subkeys))
    # A program keeps one row of scores per query in registers: 16 x 1024 or 32 x 512 of them.
    block_s = 32 if block_n <= 512 and chunk.n_queries * chunk.n_memories * n_heads > 4096 else 16
    select_halves_kernel[(triton.cdiv(chunk.n_queries, block_s), chunk.n_memories * n_heads * 2)](
        q,
        keys,
        indices,
        chunk.n_rows,
        chunk.n_chunk,
        chunk.n_tokens,
        chunk.start,
        HEADS=n_heads,
        SUBKEYS=n_subkeys,
        HALF=half_dim,
        TOP_K=top_k,
        IDW=score == "idw",
        BLOCK_S=block_s,
        BLOCK_N=block_n,
        BLOCK_D=32 if half_dim > 16 else 16,
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=8 if block_n >= 256 else 4,
        num_stages=2,
    )
