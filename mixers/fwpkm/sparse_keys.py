"""Addressing and the step of the sub-keys, forward and backward, written out for the selected sub-keys only.

Letters: M memories, S queries per memory, H heads, k slots per head, J = H*k, n sub-keys per half, K key width.
``half_*`` tensors are (M,S,H,2,k): the k best sub-keys of each half of a query, d their squared distances.

``differences`` (M,S,H,2,k,K/2) is sub-key minus query half for ``idw``, the sub-key itself for ``dot``. It is what
gradients are summed from: closed forms such as key * sum(c) - sum(c * q) save the gather, but cancel for near keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixers.fwpkm.reference import ENTROPY_EPS, ChunkOptions
from mixers.fwpkm.sparse_rows import gather_dot, gather_sum, segment_sum
from mixers.product_keys import IDW_EPS, Score, best_halves, best_pairs, table_rows


class Addresses(NamedTuple):
    """What the queries of a chunk select, kept for the key step and the backward.

    half_indices (M,S,H,2,k) int64. half_distances: squared distances, None for ``dot``.
    half_weights: softmax over the k scores of each half (P of the addressing loss).
    pairs (M,S,H,k): the chosen sums, position1 * k + position2 within the two halves' lists.
    slots (M,S,J) int64 and weights (M,S,J): softmax over the J scores of a token, at the temperature.
    """

    half_indices: Tensor
    half_distances: Tensor | None
    half_weights: Tensor
    pairs: Tensor
    slots: Tensor
    weights: Tensor


class KeyAccesses(NamedTuple):
    """The accesses to sub-keys, grouped: codes (M,S,H,2,k) are rows of the (M*H*2*n,K/2) table, ``order`` and
    ``starts`` (M*H*2*n+1,) those of :func:`segment_sum`."""

    codes: Tensor
    order: Tensor
    starts: Tensor


class StepGradients(NamedTuple):
    """Derivatives through :func:`key_step`: of q (M,S,H,2,K/2), keys (M*H*2*n,K/2), half distances (None for ``dot``),
    half scores, and of its argument ``on_half``."""

    halves: Tensor
    keys: Tensor
    half_distances: Tensor | None
    half_scores: Tensor
    on_half: Tensor


def address(q: Tensor, keys: Tensor, options: ChunkOptions, room: Tensor) -> tuple[Addresses, Tensor]:
    """Addresses of q (M,S,H,K) in keys (M,H,2,n,K/2), and their differences, which lie in ``room``.

    The choice is that of :func:`mixers.product_keys.select`: halves by the same coarse scores, ties as ``torch.topk``
    breaks them. Distances come from the differences as there, but by one fused norm instead of a square and a sum,
    which made a third of the addressing's time; sums of scores that are equal to the last bits may rank otherwise.
    """
    halves = q.unflatten(-1, (2, -1))
    half_indices = best_halves(halves, keys, options.top_k, options.score)
    differences = half_differences(q, keys, half_indices, options.score, room)
    if options.score == "idw":
        half_distances = torch.linalg.vector_norm(differences, dim=-1).square_()
        half_scores = -torch.log(IDW_EPS + half_distances)
    else:
        half_distances = None
        half_scores = (halves.unsqueeze(-2) * differences).sum(-1)
    scores, pairs, slots = best_pairs(half_scores, half_indices, keys.shape[3])
    weights = torch.softmax(scores.flatten(-2) / options.temperature, dim=-1)
    half_weights = torch.softmax(half_scores, dim=-1)
    return Addresses(half_indices, half_distances, half_weights, pairs, slots.flatten(-2), weights), differences


def half_differences(q: Tensor, keys: Tensor, half_indices: Tensor, score: Score, room: Tensor) -> Tensor:
    """Selected sub-key minus query half (``idw``), or the sub-key itself (``dot``): (M,S,H,2,k,K/2), in ``room``."""
    codes, table = table_rows(half_indices, keys.shape[3]), keys.reshape(-1, keys.shape[-1])
    found = room[: codes.numel() * table.shape[1]].view(-1, table.shape[1])
    half_keys = torch.index_select(table, 0, codes.flatten(), out=found).view(*codes.shape, -1)
    if score == "idw":
        half_keys -= q.unflatten(-1, (2, 1, -1))
    return half_keys


def key_step(
    q: Tensor,
    keys: Tensor,
    at: Addresses,
    accesses: KeyAccesses,
    differences: Tensor,
    on_half: Tensor | None,
    options: ChunkOptions,
) -> tuple[Tensor, Tensor]:
    """keys - lr * gradient after a chunk, and its addressing loss (), averaged over the memories.

    ``on_half``: what the value loss adds to the gradient on the half scores (M,S,H,2,k), None for nothing.
    """
    use = _KeyUse(at, accesses, keys.shape)
    on_scores = _entropy_gradient(at, use, options)
    loss = options.address_weight * (use.mean * use.log_mean).sum() / keys.shape[0]
    if on_half is not None:
        on_scores = on_scores + on_half
    gradient = _key_gradient(q, at, differences, on_scores, use, options)
    if options.clip:
        gradient = gradient.clamp(-1, 1)
    return keys - options.lr * gradient.view(keys.shape), loss


def key_step_backward(
    q: Tensor,
    keys: Tensor,
    at: Addresses,
    accesses: KeyAccesses,
    differences: Tensor,
    on_half: Tensor | None,
    d_new_keys: Tensor,
    options: ChunkOptions,
) -> StepGradients:
    """Derivatives through :func:`key_step`, given that of the keys after it (M,H,2,n,K/2).

    With gs the gradient on the half scores, f = -2 gs / (eps + d), G the derivative of the step's gradient on keys:

        dkeys_x = dnew_x + G_x sum f;  dq = -sum f G;  df = <G_x, key_x - q>;  then through f to gs and d
        gs = P (slope - <P, slope>), slope a function of Pbar = mean P: softmax backward, its Hessian, and the mean
    """
    o = options
    use = _KeyUse(at, accesses, keys.shape)
    half_dim = keys.shape[-1]
    halves = q.unflatten(-1, (2, -1))
    on_scores = _entropy_gradient(at, use, o)
    if on_half is not None:
        on_scores = on_scores + on_half
    on_rows = -o.lr * d_new_keys.reshape(-1, half_dim)
    if o.clip:
        on_rows = on_rows * (_key_gradient(q, at, differences, on_scores, use, o).abs() <= 1)

    codes = use.codes.view(-1, use.codes.shape[-1])
    d_distances = None
    if at.half_distances is not None:
        factor = -2 * on_scores / (IDW_EPS + at.half_distances)
        d_factor = gather_dot(on_rows, codes.view(-1, 1), differences.view(-1, half_dim)).view(factor.shape)
        d_on_scores = -2 * d_factor / (IDW_EPS + at.half_distances)
        d_distances = -d_factor * factor / (IDW_EPS + at.half_distances)
        d_halves = -gather_sum(on_rows, codes, factor.view(codes.shape))
        d_keys = d_new_keys.reshape(-1, half_dim) + on_rows * use.sum(factor).unsqueeze(-1)
    else:
        d_on_scores = gather_dot(on_rows, codes, halves.reshape(-1, half_dim)).view(on_scores.shape)
        d_halves = gather_sum(on_rows, codes, on_scores.view(codes.shape))
        d_keys = d_new_keys.reshape(-1, half_dim)

    slope = use.gather(use.slope(o.address_weight))
    weights = at.half_weights
    centred = d_on_scores - (weights * d_on_scores).sum(-1, keepdim=True)
    d_weights = d_on_scores * (slope - (weights * slope).sum(-1, keepdim=True)) - slope * (weights * d_on_scores).sum(
        -1, keepdim=True
    )
    d_mean = use.slope_derivative(o.address_weight) * use.sum_over_heads(weights * centred)
    d_weights = d_weights + use.gather(d_mean) / use.n_entries
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    return StepGradients(d_halves.view(halves.shape), d_keys, d_distances, d_scores, d_on_scores)


def address_backward(
    q: Tensor,
    keys: Tensor,
    at: Addresses,
    accesses: KeyAccesses,
    differences: Tensor,
    step: StepGradients | None,
    d_weights: Tensor,
    options: ChunkOptions,
) -> tuple[Tensor, Tensor]:
    """Derivatives of q (M,S,H,K) and keys (M,H,2,n,K/2) through :func:`address`, given those of the read weights
    (M,S,J) and those of the key step (None: the keys did not move, or nothing depends on where they went)."""
    half_dim = keys.shape[-1]
    halves = q.unflatten(-1, (2, -1))
    d_half_scores = pairs_to_halves(softmax_backward(at.weights, d_weights, options.temperature), at.pairs)
    d_halves = d_keys = d_distances = None
    if step is not None:
        d_half_scores = d_half_scores + step.half_scores
        d_halves, d_keys, d_distances = step.halves, step.keys, step.half_distances

    order, starts = accesses.order, accesses.starts
    if at.half_distances is not None:
        from_scores = -d_half_scores / (IDW_EPS + at.half_distances)
        slope = 2 * (from_scores if d_distances is None else from_scores + d_distances)
        through_q = -(slope.unsqueeze(-2) @ differences).squeeze(-2)
        through_keys = segment_sum(differences.view(-1, half_dim), slope.reshape(-1, 1), order, starts)
    else:
        through_q = (d_half_scores.unsqueeze(-2) @ differences).squeeze(-2)
        weights = d_half_scores.reshape(-1, d_half_scores.shape[-1])
        through_keys = segment_sum(halves.reshape(-1, half_dim), weights, order, starts)
    if step is not None:
        through_q, through_keys = through_q + d_halves, through_keys + d_keys
    return through_q.reshape(q.shape), through_keys.view(keys.shape)


def softmax_backward(weights: Tensor, d_weights: Tensor, temperature: float) -> Tensor:
    """Derivative of the scores where weights = softmax(scores / temperature) over the last dimension."""
    return weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) / temperature


def pairs_to_halves(on_pairs: Tensor, pairs: Tensor) -> Tensor:
    """Derivatives on pair scores (M,S,J) summed onto the halves' scores (M,S,H,2,k): a pair's score is their sum."""
    top_k = pairs.shape[-1]
    on_pairs = on_pairs.view(pairs.shape).unsqueeze(-1)
    positions = torch.arange(top_k, device=pairs.device)
    first = (pairs // top_k).unsqueeze(-1) == positions
    second = (pairs % top_k).unsqueeze(-1) == positions
    return torch.stack([(on_pairs * first).sum(-2), (on_pairs * second).sum(-2)], dim=-2)


def halves_to_pairs(on_halves: Tensor, pairs: Tensor) -> Tensor:
    """The transpose of :func:`pairs_to_halves`: (M,S,H,2,k) -> (M,S,J)."""
    top_k = pairs.shape[-1]
    first = on_halves[..., 0, :].gather(-1, pairs // top_k)
    second = on_halves[..., 1, :].gather(-1, pairs % top_k)
    return (first + second).flatten(-2)


class _KeyUse:
    """How often a chunk uses each sub-key, P summed over its accesses; mean is Pbar (M,2,n)."""

    def __init__(self, at: Addresses, accesses: KeyAccesses, shape: torch.Size) -> None:
        self.shape = shape[:-1]
        self.codes, self.order, self.starts = accesses
        self.n_entries = at.half_indices.shape[1] * at.half_indices.shape[2]
        self.mean = self.sum_over_heads(at.half_weights) / self.n_entries
        self.log_mean = torch.log(self.mean + ENTROPY_EPS)

    def sum(self, on_accesses: Tensor) -> Tensor:
        """(M,S,H,2,k) -> (M*H*2*n,): summed over the accesses of each sub-key."""
        ones = on_accesses.new_ones(on_accesses.numel(), 1)
        return segment_sum(ones, on_accesses.reshape(-1, 1), self.order, self.starts).squeeze(-1)

    def sum_over_heads(self, on_accesses: Tensor) -> Tensor:
        """(M,S,H,2,k) -> (M,2,n)."""
        return self.sum(on_accesses).view(self.shape).sum(1)

    def gather(self, on_keys: Tensor) -> Tensor:
        """(M,2,n) -> (M,S,H,2,k): each access's own."""
        return on_keys.unsqueeze(1).expand(self.shape).reshape(-1)[self.codes]

    def slope(self, address_weight: float) -> Tensor:
        """d A / d P of any access to a sub-key (M,2,n)."""
        return address_weight * (self.log_mean + self.mean / (self.mean + ENTROPY_EPS)) / self.n_entries

    def slope_derivative(self, address_weight: float) -> Tensor:
        """d slope / d Pbar (M,2,n)."""
        shifted = self.mean + ENTROPY_EPS
        return address_weight * (1 / shifted + ENTROPY_EPS / shifted.square()) / self.n_entries


def _entropy_gradient(at: Addresses, use: _KeyUse, options: ChunkOptions) -> Tensor:
    """d A / d half_scores (M,S,H,2,k)."""
    return softmax_backward(at.half_weights, use.gather(use.slope(options.address_weight)), 1.0)


def _key_gradient(
    q: Tensor, at: Addresses, differences: Tensor, on_scores: Tensor, use: _KeyUse, options: ChunkOptions
) -> Tensor:
    """A gradient on the half scores (M,S,H,2,k) carried to the rows of the sub-key table (M*H*2*n,K/2)."""
    half_dim = differences.shape[-1]
    if at.half_distances is not None:
        # s = -log(eps + d), d = |key - q|^2: ds/dkey = -2 (key - q) / (eps + d).
        factor = -2 * on_scores / (IDW_EPS + at.half_distances)
        return segment_sum(differences.view(-1, half_dim), factor.reshape(-1, 1), use.order, use.starts)
    halves = q.reshape(-1, half_dim)
    return segment_sum(halves, on_scores.reshape(-1, on_scores.shape[-1]), use.order, use.starts)


def group_keys(at: Addresses, keys: Tensor) -> KeyAccesses:
    """Group the accesses to the sub-keys (M,H,2,n,K/2); every sub-key counts, also those that nobody accesses."""
    codes, n_rows = table_rows(at.half_indices, keys.shape[3]), keys.shape[:-1].numel()
    in_order, order = torch.sort(codes.flatten(), stable=True)
    starts = torch.searchsorted(in_order, torch.arange(n_rows + 1, device=codes.device))
    return KeyAccesses(codes, order, starts)
