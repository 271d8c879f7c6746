"""Product keys: the k best of N = n*n slots for the price of 2n scores (Lample et al. 2019, arXiv:1907.05242).

A query (K) is cut in two halves, each scored against n sub-keys of width K/2. The k best of each half are kept,
their k*k sums formed, and the k best sums kept; slot = i1 * n + i2. As a slot's score is the sum of its halves'
scores, this finds the k best of all n*n slots exactly.

Letters: M memories, S queries per memory, H heads, k slots read per head, n sub-keys per half, V value width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Score = Literal["idw", "dot"]
IDW_EPS = 1e-3


class Selection(NamedTuple):
    """The slots that queries address. Gradients flow through scores, never through the choice.

    half_indices (M,S,H,2,k): the k best sub-keys of each half, best first.
    half_keys (M,S,H,2,k,K/2): those sub-keys. half_distances (M,S,H,2,k): squared distance to them, None for ``dot``.
    half_scores (M,S,H,2,k): their scores.
    pairs (M,S,H,k): the chosen sums, as position1 * k + position2 within the two lists above.
    slots (M,S,H,k) int64 and scores (M,S,H,k): the chosen slots, best first.
    """

    half_indices: Tensor
    half_keys: Tensor
    half_distances: Tensor | None
    half_scores: Tensor
    pairs: Tensor
    slots: Tensor
    scores: Tensor


def select(queries: Tensor, keys: Tensor, top_k: int, score: Score) -> Selection:
    """Address ``queries`` (M,S,H,K) in the sub-keys (M,H,2,n,K/2) of each memory.

    ``idw``: s = -log(1e-3 + |q_half - key|^2) (inverse distance weighting; a softmax over sums of two such scores
    is proportional to 1 / ((1e-3 + d1)(1e-3 + d2))). ``dot``: s = <q_half, key>.

    The choice uses |q|^2 - 2<q,key> + |key|^2, which cancels for near keys; the chosen k are scored again from the
    differences themselves, so scores are exact to rounding.

    Exact ties are broken as ``torch.topk`` breaks them: the same way every time, by no rule that another device or
    implementation need follow (the Triton kernels take the lowest index). Whichever of the tied slots are taken, the
    scores, and so the weights, are the same as a multiset; reads and gradients differ only as far as the tied slots'
    rows do, and only the sum of the tied slots' gradients is determined. A write moves only those that were taken, so
    later chunks may part. Two sub-keys whose coarse scores differ by less than their rounding, a few eps * |q| |key|,
    may swap; what is chosen instead scores as well to that rounding.
    """
    n_memories, n_queries, n_heads, key_dim = queries.shape
    n_subkeys = keys.shape[3]
    halves = queries.reshape(n_memories, n_queries, n_heads, 2, key_dim // 2)
    half_indices = best_halves(halves, keys, top_k, score)
    half_keys = F.embedding(table_rows(half_indices, n_subkeys), keys.reshape(-1, key_dim // 2))
    if score == "idw":
        half_distances = (halves.unsqueeze(-2) - half_keys).square().sum(-1)
        half_scores = -torch.log(IDW_EPS + half_distances)
    else:
        half_distances = None
        half_scores = (halves.unsqueeze(-2) * half_keys).sum(-1)

    scores, pairs, slots = best_pairs(half_scores, half_indices, n_subkeys)
    return Selection(half_indices, half_keys, half_distances, half_scores, pairs, slots, scores)


def choose(queries: Tensor, keys: Tensor, top_k: int, score: Score) -> tuple[Tensor, Tensor]:
    """slots and scores (M,S,H,k) of :func:`select`, where nothing else is wanted.

    Scores of ``dot`` are exact as they come from the product with all sub-keys, so they are taken from there: forward
    and backward form (M,S,H,2,n) numbers, and not the chosen sub-keys, (M,S,H,2,k,K/2). ``idw`` needs those.
    """
    if score == "idw":
        selection = select(queries, keys, top_k, score)
        return selection.slots, selection.scores
    halves = queries.unflatten(-1, (2, -1))
    half_scores = torch.einsum("mshak,mhank->mshan", halves, keys)
    half_indices = half_scores.detach().topk(top_k, dim=-1).indices
    scores, _, slots = best_pairs(half_scores.gather(-1, half_indices), half_indices, keys.shape[3])
    return slots, scores


@torch.no_grad()
def best_halves(halves: Tensor, keys: Tensor, top_k: int, score: Score) -> Tensor:
    """The k best of the sub-keys (M,H,2,n,K/2) for each half (M,S,H,2,K/2): (M,S,H,2,k) int64, best first."""
    n_memories, n_queries, n_heads = halves.shape[:3]
    by_half = halves.permute(0, 2, 3, 1, 4).reshape(2 * n_memories * n_heads, n_queries, halves.shape[-1])
    best = best_subkeys(by_half, keys.flatten(0, 2), top_k, score).indices
    return best.view(n_memories, n_heads, 2, n_queries, top_k).permute(0, 3, 1, 2, 4)


@torch.no_grad()
def best_subkeys(
    queries: Tensor, keys: Tensor, top_k: int, score: Score, key_squares: Tensor | None = None
) -> torch.return_types.topk:
    """The k best of the sub-keys (A,n,K/2) for each query (A,S,K/2) of the same of A tables, best first: indices
    (A,S,k) int64, and values (A,S,k), what they are ranked by.

    idw ranks by <q,key> - |key|^2 / 2: |q|^2 is the same for all sub-keys of a query, and 2 does not change the order.
    ``key_squares`` (A,n): the |key|^2, where they are known.
    """
    coarse = torch.bmm(queries, keys.mT)
    if score == "idw":
        squares = squared_norms(keys) if key_squares is None else key_squares
        coarse.sub_(squares.unsqueeze(1), alpha=0.5)
    return coarse.topk(top_k, dim=-1)


def squared_norms(rows: Tensor) -> Tensor:
    """|row|^2: (...,W) -> (...)."""
    return torch.linalg.vecdot(rows, rows)


def best_pairs(half_scores: Tensor, half_indices: Tensor, n_subkeys: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best sums of one score of each half: scores, pairs and slots (M,S,H,k) of :class:`Selection`."""
    top_k = half_scores.shape[-1]
    sums = (half_scores[..., 0, :, None] + half_scores[..., 1, None, :]).flatten(-2)
    scores, pairs = sums.topk(top_k, dim=-1)
    first = half_indices[..., 0, :].gather(-1, pairs // top_k)
    second = half_indices[..., 1, :].gather(-1, pairs % top_k)
    return scores, pairs, first * n_subkeys + second


def table_rows(half_indices: Tensor, n_subkeys: int) -> Tensor:
    """Sub-keys (M,S,H,2,k) of each memory, head and half as rows of the whole table (M*H*2*n)."""
    n_memories, _, n_heads = half_indices.shape[:3]
    tables = torch.arange(n_memories * n_heads * 2, device=half_indices.device).view(n_memories, 1, n_heads, 2, 1)
    return half_indices + tables * n_subkeys


def read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights_j * values[slot_j]: values (M,N,V), slots and weights (M,S,J) -> (M,S,V).

    A fused gather and weighted sum: the (M,S,J,V) rows are never formed.
    """
    n_memories, n_slots, value_dim = values.shape
    offsets = torch.arange(n_memories, device=slots.device).view(-1, 1, 1) * n_slots
    n_read = slots.shape[-1]
    rows = F.embedding_bag(
        (slots + offsets).reshape(-1, n_read),
        values.reshape(-1, value_dim),
        mode="sum",
        per_sample_weights=weights.reshape(-1, n_read),
    )
    return rows.view(n_memories, -1, value_dim)


def dot_rows(values: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """<values[slot_j], x>: values (M,N,V), slots (M,S,J) and x (M,S,V) -> (M,S,J). The rows (M,S,J,V) are formed."""
    n_memories, n_slots, value_dim = values.shape
    offsets = torch.arange(n_memories, device=slots.device).view(-1, 1, 1) * n_slots
    rows = F.embedding(slots + offsets, values.reshape(-1, value_dim))
    return torch.einsum("msjv,msv->msj", rows, x)
