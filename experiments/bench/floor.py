"""The unavoidable work alone: the same distances, choices and row gathers and writes, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixers.product_keys import best_halves, read


def unavoidable_work(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, chunk_size: int, n_memories: int, backward: bool
) -> Callable[[], object]:
    """The operation to time, for q (B,T,H,K), keys (H,2,n,K/2), values (N,V) and the slots (B,T,H,k) really read.

    Per chunk: scores of all sub-keys and their k best; one fused gather of every access's row; the distinct rows
    written once. With a backward: two gathers of all accesses and one write of the distinct rows more. Which rows are
    distinct is found beforehand. Nothing is computed from what is gathered, so no results come out.
    """
    n_sequences, n_tokens = q.shape[:2]
    by_memory = q.reshape(n_memories, -1, n_tokens, *q.shape[2:])
    tables = keys.expand(n_memories, *keys.shape)
    offsets = torch.arange(n_memories, device=q.device).view(-1, 1, 1, 1) * values.shape[0]
    accesses = slots.reshape(n_memories, n_sequences // n_memories, n_tokens, -1)
    top_k = slots.shape[-1]
    chunks = []
    for start in range(0, n_tokens, chunk_size):
        part = slice(start, start + chunk_size)
        n_distinct = torch.unique(accesses[:, :, part] + offsets).numel()
        halves = by_memory[:, :, part].reshape(n_memories, -1, q.shape[2], 2, q.shape[3] // 2)
        rows = accesses[:, :, part].reshape(1, -1, accesses.shape[-1])
        weights = values.new_full(rows.shape, 1 / accesses.shape[-1])
        chunks.append((halves, rows, weights, n_distinct))
    n_most = max(n_distinct for *_, n_distinct in chunks)
    pool, fresh = values.new_zeros(n_most, values.shape[1]), values.new_ones(n_most, values.shape[1])
    order = torch.randperm(n_most, generator=torch.Generator().manual_seed(0)).to(values.device)
    places = [order[:n_distinct] for *_, n_distinct in chunks]
    n_gathers, n_writes = (3, 2) if backward else (1, 1)
    base = values.unsqueeze(0)

    @torch.no_grad()
    def work() -> None:
        for (halves, rows, weights, _), at in zip(chunks, places, strict=True):
            best_halves(halves, tables, top_k, "idw")
            for _ in range(n_gathers):
                read(base, rows, weights)
            for _ in range(n_writes):
                pool.index_copy_(0, at, fresh[: at.numel()])

    return work
