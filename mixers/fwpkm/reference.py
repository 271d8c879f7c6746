"""Fast-weight product-key memory, readable: the definitions in plain torch, differentiated by autograd.

Every chunk makes new tables, so autograd carries the gradient through all writes of a call. Cost and memory grow
with the size of the table times the number of chunks.

Letters: M memories, R sequences per memory, C chunk, H heads, K key width, k slots per head, n sub-keys per half,
N = n*n slots, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixers.product_keys import IDW_EPS, Score, Selection, read, select

ENTROPY_EPS = 1e-8


@dataclass(frozen=True)
class ChunkOptions:
    """The options of :func:`mixers.fwpkm.fast_weight_pkm` that a chunk needs."""

    chunk_size: int
    top_k: int
    lookahead: int
    lr: float
    weight_decay: float
    score: Score
    temperature: float
    address_weight: float
    value_loss_to_keys: bool
    clip: bool
    update_scale: str


class ChunksOutput(NamedTuple):
    """read (M,R,T,V), keys (M,H,2,n,K/2), values (M,N,V), slots and weights (M,R,T,H*k), the two losses ()."""

    read: Tensor
    keys: Tensor
    values: Tensor
    slots: Tensor
    weights: Tensor
    value_loss: Tensor
    address_loss: Tensor


class Address(NamedTuple):
    """What a chunk's queries select: the selection, and slots and softmax weights (M,S,H*k)."""

    selection: Selection
    slots: Tensor
    weights: Tensor


def address(q: Tensor, keys: Tensor, options: ChunkOptions) -> Address:
    """Slots and weights of queries (M,R,C,H,K): one softmax over all H*k scores of a token."""
    n_memories, n_rows, n_chunk, n_heads, key_dim = q.shape
    flat = q.reshape(n_memories, n_rows * n_chunk, n_heads, key_dim)
    selection = select(flat, keys, options.top_k, options.score)
    weights = torch.softmax(selection.scores.flatten(-2) / options.temperature, dim=-1)
    return Address(selection, selection.slots.flatten(-2), weights)


def write_chunks(
    q: Tensor, v: Tensor, gate: Tensor | None, keys: Tensor, values: Tensor, mask: Tensor | None, options: ChunkOptions
) -> ChunksOutput:
    """Read and write q (M,R,T,H,K), v (M,R,T,V), gate and mask (M,R,T) chunk by chunk into keys and values."""
    n_memories, n_rows, n_tokens, n_heads, _ = q.shape
    n_read = n_heads * options.top_k
    reads, slots, weights = [], [], []
    squared_error, neg_entropy, n_pairs = q.new_zeros(()), q.new_zeros(()), 0
    starts = range(0, n_tokens, options.chunk_size)
    for start in starts:
        part = slice(start, start + options.chunk_size)
        at = address(q[:, :, part], keys, options)
        rows = read(values, at.slots, at.weights)
        chunk = _Chunk(
            q[:, :, part],
            v[:, :, part],
            None if gate is None else gate[:, :, part],
            None if mask is None else mask[:, :, part],
            at,
            rows.view(n_memories, n_rows, -1, values.shape[-1]),
        )
        reads.append(chunk.read)
        slots.append(at.slots.view(n_memories, n_rows, -1, n_read))
        weights.append(at.weights.view(n_memories, n_rows, -1, n_read))
        keys, values, chunk_error, chunk_entropy = _write(chunk, keys, values, options)
        squared_error = squared_error + chunk_error
        neg_entropy = neg_entropy + chunk_entropy
        n_pairs += n_memories * n_rows * max(chunk.q.shape[2] - options.lookahead, 0)
    if not reads:
        empty = (n_memories, n_rows, 0)
        return ChunksOutput(
            q.new_zeros(*empty, values.shape[-1]),
            keys,
            values,
            torch.zeros(*empty, n_read, dtype=torch.int64, device=q.device),
            q.new_zeros(*empty, n_read),
            squared_error,
            neg_entropy,
        )
    return ChunksOutput(
        torch.cat(reads, dim=2),
        keys,
        values,
        torch.cat(slots, dim=2),
        torch.cat(weights, dim=2),
        0.5 * squared_error / max(n_pairs, 1),
        neg_entropy / len(starts),
    )


class _Chunk(NamedTuple):
    """One chunk of tokens with what it read: q (M,R,C,H,K), v and read (M,R,C,V), gate and mask (M,R,C)."""

    q: Tensor
    v: Tensor
    gate: Tensor | None
    mask: Tensor | None
    at: Address
    read: Tensor


def _write(chunk: _Chunk, keys: Tensor, values: Tensor, options: ChunkOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tables after the chunk, its summed weighted squared error (mean over V), its addressing loss."""
    n_memories, n_rows, n_chunk = chunk.q.shape[:3]
    n_writing = max(n_chunk - options.lookahead, 0)
    value_dim = values.shape[-1]

    # e_t for the pairs (t, t+L); the last L tokens of the chunk have none.
    difference = chunk.read[:, :, :n_writing] - chunk.v[:, :, n_chunk - n_writing :]
    pair_weight = chunk.read.new_ones(n_memories, n_rows, n_writing)
    if chunk.gate is not None:
        pair_weight = pair_weight * chunk.gate[:, :, :n_writing]
    if chunk.mask is not None:
        pair_weight = pair_weight * chunk.mask[:, :, :n_writing]
    error = pair_weight.unsqueeze(-1) * difference
    squared_error = (pair_weight * difference.square().mean(-1)).sum()

    value_rows = _value_rows(chunk, error, values.shape[1], options)
    half_gradient, neg_entropy = _address_gradient(chunk, keys.shape[3], options)
    if options.value_loss_to_keys and n_writing:
        n_pairs = n_rows * n_writing
        half_gradient = half_gradient + _value_loss_on_halves(chunk, error / (n_pairs * value_dim), values, options)
    key_rows = _key_rows(chunk, half_gradient, keys.shape[3], options)
    return (
        _descend(keys.flatten(0, 3), key_rows, options).view(keys.shape),
        _descend(values.flatten(0, 1), value_rows, options).view(values.shape),
        squared_error,
        neg_entropy,
    )


class _GradientRows(NamedTuple):
    """A gradient on a table, as rows to be summed: index (E,) int64 and rows (E,W)."""

    index: Tensor
    rows: Tensor


def _descend(table: Tensor, gradient: _GradientRows, options: ChunkOptions) -> Tensor:
    """p - lr * (gradient + weight_decay * p), the gradient's entries clipped to +-1 where asked for."""
    if options.clip:
        summed = torch.zeros_like(table).index_add(0, gradient.index, gradient.rows).clamp(-1, 1)
        return table - options.lr * (summed + options.weight_decay * table)
    if options.weight_decay:
        table = table * (1 - options.lr * options.weight_decay)
    return table.index_add(0, gradient.index, -options.lr * gradient.rows)


def _value_rows(chunk: _Chunk, error: Tensor, n_slots: int, options: ChunkOptions) -> _GradientRows:
    """scale / cnt_u * a_tj e_t for every pair's accesses (t,j) -> u."""
    n_memories, n_rows, n_writing, value_dim = error.shape
    n_chunk, n_read = chunk.q.shape[2], chunk.at.slots.shape[-1]
    offsets = torch.arange(n_memories, device=error.device).view(-1, 1, 1) * n_slots
    accessed = (chunk.at.slots + offsets).view(n_memories, n_rows, n_chunk, n_read)
    counts = error.new_zeros(n_memories * n_slots)
    counts.index_add_(0, accessed.flatten(), error.new_ones(()).expand(accessed.numel()))

    writing = accessed[:, :, :n_writing]
    share = chunk.at.weights.view(n_memories, n_rows, n_chunk, n_read)[:, :, :n_writing] / counts[writing]
    if options.update_scale == "released" and n_writing:
        n_pairs = n_rows * n_writing
        if chunk.mask is None:
            n_effective = error.new_full((n_memories,), n_rows * n_chunk)
        else:
            n_effective = chunk.mask[:, :, :n_writing].to(error.dtype).sum(dim=(1, 2))
        share = share * (n_read * n_effective / n_pairs).view(-1, 1, 1, 1)
    rows = share.unsqueeze(-1) * error.unsqueeze(-2)
    return _GradientRows(writing.flatten(), rows.reshape(-1, value_dim))


def _address_gradient(chunk: _Chunk, n_subkeys: int, options: ChunkOptions) -> tuple[Tensor, Tensor]:
    """d A / d half_scores (M,S,H,2,k) and A itself, averaged over the memories.

    A = w * sum over halves and sub-keys of Pbar log(Pbar + 1e-8), with P the softmax over each token-head's k best
    sub-key scores and Pbar its mean over the tokens and heads of the chunk.
    """
    selection = chunk.at.selection
    probability = torch.softmax(selection.half_scores, dim=-1)
    n_memories, n_queries, n_heads, _, _ = probability.shape
    by_half = selection.half_indices.permute(0, 3, 1, 2, 4).reshape(n_memories, 2, -1)
    mean = torch.zeros(n_memories, 2, n_subkeys, dtype=probability.dtype, device=probability.device).scatter_add(
        -1, by_half, probability.permute(0, 3, 1, 2, 4).reshape(n_memories, 2, -1) / (n_queries * n_heads)
    )
    log_mean = torch.log(mean + ENTROPY_EPS)
    loss = options.address_weight * (mean * log_mean).sum() / n_memories
    slope = options.address_weight * (log_mean + mean / (mean + ENTROPY_EPS)) / (n_queries * n_heads)
    slope = slope.gather(-1, by_half).view(n_memories, 2, n_queries, n_heads, -1).permute(0, 2, 3, 1, 4)
    # Backward of the softmax.
    return probability * (slope - (probability * slope).sum(-1, keepdim=True)), loss


def _value_loss_on_halves(chunk: _Chunk, error_mean: Tensor, values: Tensor, options: ChunkOptions) -> Tensor:
    """d (0.5 mean_pairs[g m mean_V (read - v)^2]) / d half_scores (M,S,H,2,k), from the scaled errors of the pairs."""
    n_memories, n_rows, n_writing, value_dim = error_mean.shape
    n_chunk = chunk.q.shape[2]
    selection = chunk.at.selection
    n_heads, top_k = selection.pairs.shape[2:]
    silent = error_mean.new_zeros(n_memories, n_rows, n_chunk - n_writing, value_dim)
    error_mean = torch.cat([error_mean, silent], dim=2).reshape(n_memories, -1, value_dim)

    offsets = torch.arange(n_memories, device=values.device).view(-1, 1, 1) * values.shape[1]
    rows = torch.nn.functional.embedding(chunk.at.slots + offsets, values.reshape(-1, value_dim))
    on_weights = torch.einsum("msjv,msv->msj", rows, error_mean)
    weights = chunk.at.weights
    on_scores = weights * (on_weights - (weights * on_weights).sum(-1, keepdim=True)) / options.temperature
    on_scores = on_scores.view(n_memories, -1, n_heads, top_k)
    # A pair's score is the sum of its two halves' scores.
    nothing = torch.zeros_like(on_scores)
    first = nothing.scatter_add(-1, selection.pairs // top_k, on_scores)
    second = nothing.scatter_add(-1, selection.pairs % top_k, on_scores)
    return torch.stack([first, second], dim=-2)


def _key_rows(chunk: _Chunk, on_half_scores: Tensor, n_subkeys: int, options: ChunkOptions) -> _GradientRows:
    """Carry a gradient on the half scores (M,S,H,2,k) to the rows of the sub-key table."""
    selection = chunk.at.selection
    n_memories, _, n_heads = on_half_scores.shape[:3]
    half_dim = chunk.q.shape[-1] // 2
    queries = chunk.q.reshape(n_memories, -1, n_heads, 2, 1, half_dim)
    if options.score == "idw":
        # s = -log(eps + d), d = |q - key|^2: ds/dkey = -2 (key - q) / (eps + d).
        slope = -2 * on_half_scores / (IDW_EPS + selection.half_distances)
        rows = slope.unsqueeze(-1) * (selection.half_keys - queries)
    else:
        rows = on_half_scores.unsqueeze(-1) * queries
    tables = torch.arange(n_memories * n_heads * 2, device=rows.device).view(n_memories, 1, n_heads, 2, 1)
    index = (selection.half_indices + tables * n_subkeys).flatten()
    return _GradientRows(index, rows.reshape(-1, half_dim))
