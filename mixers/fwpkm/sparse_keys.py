"""Addressing and the step of the sub-keys, chunk by chunk, forward and backward, for the selected sub-keys only.

Letters: M memories, S queries per memory, H heads, A = M*H*2 halves of heads, k slots per head, J = H*k, n sub-keys
per half, K key width, G chunks of equal length.

``found``, differences (A,S,k,K/2), is sub-key minus query half, for ``idw``. Distances and gradients come from it only
if a chosen key is near: sums apart such as key * sum(c) - sum(c * q) save forming it, but cancel for near keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixers.fwpkm.reference import ENTROPY_EPS, ChunkOptions
from mixers.fwpkm.sparse_rows import bag_sums, dots, gather_dot, gather_sum, stable_order
from mixers.product_keys import IDW_EPS, best_subkeys, squared_norms

# Of |q|^2 + |key|^2: a squared distance from here on has lost two bits to cancellation, a difference one.
FAR = 0.25
# Fewer numbers than these are formed in the time that it takes to call the operations that would spare them.
MANY_DIFFERENCES = 2**18


class Addresses(NamedTuple):
    """The k best sub-keys of every half of a chunk's queries, for the step of the keys and the backward.

    keys (A,n,K/2): those addressed. codes (A,S,k) int64: rows of the (A*n,K/2) table. order and starts: their accesses
    grouped by sub-key, for sums; None where none is formed. inverse (A,S,k): 1 / (eps + squared distance), None for
    ``dot``. scores (A,S,k).
    """

    keys: Tensor
    codes: Tensor
    order: Tensor | None
    starts: Tensor | None
    inverse: Tensor | None
    scores: Tensor

    def sums(self, rows: Tensor, weights: Tensor | None, n_per_row: int = 1) -> Tensor:
        """(A*n,W): weights summed over a sub-key's accesses; rows (A*S*k/n_per_row,W), weights (A,S,k) or None."""
        index = self.order if n_per_row == 1 else self.order.div(n_per_row, rounding_mode="floor")
        return bag_sums(
            rows, index, self.starts, None if weights is None else weights.flatten().index_select(0, self.order)
        )

    def gather(self, on_keys: Tensor) -> Tensor:
        """(A*n,) -> (A,S,k): each access's own."""
        return on_keys.index_select(0, self.codes.flatten()).view(self.codes.shape)


class Use(NamedTuple):
    """How a chunk uses the sub-keys. weights (A,S,k): P, the softmax over the k scores of a half. mean (M,2,n): Pbar.
    on_scores (A,S,k): the step's gradient on the scores."""

    weights: Tensor
    mean: Tensor
    on_scores: Tensor


class StepGradients(NamedTuple):
    """Derivatives through :func:`key_step`: of q (A,S,K/2), keys (A*n,K/2), scores (A,S,k), and through the distances,
    as what must be added to the scores' (None for ``dot``); of its argument ``on_half`` (A,S,k)."""

    halves: Tensor
    keys: Tensor
    scores: Tensor
    through_distances: Tensor | None
    on_half: Tensor


def address(
    halves: Tensor, keys: Tensor, options: ChunkOptions, room: Tensor, is_grouped: bool
) -> tuple[Addresses, Tensor | None]:
    """Addresses of query halves (A,S,K/2) in keys (A,n,K/2); their differences, in ``room``, if they were formed.

    The choice is that of :func:`mixers.product_keys.select`: halves by the same coarse scores, ties as ``torch.topk``
    breaks them. ``dot`` scores are those coarse scores. So are distances where none is so short that it cancels, see
    :func:`_far_distances`; else they come from the differences as in ``select``, but by one fused norm instead of a
    square and a sum. Sums of scores that are equal to the last bits may rank otherwise.
    """
    n_halves, n_subkeys, _ = keys.shape
    key_squares = squared_norms(keys)
    coarse, chosen = best_subkeys(halves, keys, options.top_k, options.score, key_squares)
    codes = chosen.add_(torch.arange(0, n_halves * n_subkeys, n_subkeys, device=keys.device).view(-1, 1, 1))
    found = inverse = None
    if options.score == "idw":
        distances = _far_distances(halves, key_squares, coarse)
        if distances is None:
            found = differences(halves, keys, codes, room)
            distances = torch.linalg.vector_norm(found, dim=-1).square_()
        inverse = distances.add_(IDW_EPS).reciprocal_()
        scores = inverse.log()
    else:
        scores = coarse
    order = starts = None
    if is_grouped:
        # Every sub-key counts, also those that nobody accesses.
        order = stable_order(codes.flatten(), n_halves * n_subkeys)
        counts = torch.bincount(codes.flatten(), minlength=n_halves * n_subkeys)
        starts = counts.cumsum(0).sub_(counts)
    return Addresses(keys, codes, order, starts, inverse, scores), found


def _far_distances(halves: Tensor, key_squares: Tensor, coarse: Tensor) -> Tensor | None:
    """Squared distances (A,S,k) as |q|^2 - 2 (<q,key> - |key|^2 / 2) from the coarse scores (A,S,k), if all are far.

    That saves forming the differences (A,S,k,K/2), which takes as long as everything else of the addressing but the
    product with all sub-keys.
    """
    if not _are_many(coarse, halves):
        return None
    squares = squared_norms(halves)
    distances = torch.sub(squares.unsqueeze(-1), coarse, alpha=2)
    return distances if _are_far(squares, key_squares, distances.amin()) else None


def _are_many(scores: Tensor, halves: Tensor) -> bool:
    """Whether differences for scores (A,S,k) are worth being spared. Off the CPU never: to know what may stand for them
    would be to wait for the device."""
    return scores.device.type == "cpu" and scores.numel() * halves.shape[-1] >= MANY_DIFFERENCES


def _are_far(squares: Tensor, key_squares: Tensor, nearest: Tensor) -> bool:
    """Whether what is summed apart over keys and queries is as precise as sums over differences, up to a small factor:
    the squared distance ``nearest`` () is not below a quarter of the longest |q|^2 + |key|^2. False for NaN.
    ``squares`` (A,S) are the |q|^2."""
    return bool(nearest >= FAR * (squares.amax() + key_squares.amax()))


def differences(halves: Tensor, keys: Tensor, codes: Tensor, room: Tensor) -> Tensor:
    """Selected sub-key minus query half: (A,S,k,K/2), in ``room``."""
    half_dim = keys.shape[-1]
    found = room[: codes.numel() * half_dim].view(-1, half_dim)
    found = torch.index_select(keys.view(-1, half_dim), 0, codes.flatten(), out=found).view(*codes.shape, half_dim)
    return found.sub_(halves.unsqueeze(2))


def needed_differences(halves: Tensor, at: Addresses, room: Tensor) -> Tensor | None:
    """Those of a chunk's addresses, for its backward, unless sums apart do: for ``dot``, and where all are far."""
    if at.inverse is None:
        return None
    if _are_many(at.scores, halves):
        nearest = at.inverse.amax().reciprocal_().sub_(IDW_EPS)
        if _are_far(squared_norms(halves), squared_norms(at.keys), nearest):
            return None
    return differences(halves, at.keys, at.codes, room)


def use_of(at: Addresses, n_memories: int, on_half: Tensor | None, options: ChunkOptions) -> Use:
    """P, Pbar and the gradient of the addressing loss on the scores, to which ``on_half`` (A,S,k) is added."""
    if at.inverse is not None:
        weights = at.inverse / at.inverse.sum(-1, keepdim=True)
    else:
        weights = torch.softmax(at.scores, dim=-1)
    mean = _over_heads(at.sums(weights.view(-1, 1), None), at, n_memories) / _n_entries(at, n_memories)
    slope = at.gather(_to_heads(_slope(mean, at, n_memories, options), at))
    on_scores = softmax_backward(weights, slope)
    return Use(weights, mean, on_scores if on_half is None else on_scores + on_half)


def neg_entropy(mean: Tensor) -> Tensor:
    """Pbar log(Pbar + 1e-8), summed: mean (...) -> ()."""
    return (mean * torch.log(mean + ENTROPY_EPS)).sum()


def key_step(halves: Tensor, at: Addresses, use: Use, found: Tensor | None, options: ChunkOptions) -> Tensor:
    """keys - lr * gradient after a chunk (A,n,K/2), for its differences ``found``, if they were formed."""
    if found is None and at.inverse is not None and not options.clip:
        # keys * (1 - sum c) + sum c q, with c = -2 lr u: the sums apart that make up the gradient, in one pass less.
        moves = use.on_scores * at.inverse * (-2 * options.lr)
        kept = 1 - at.sums(moves.view(-1, 1), None)
        of_queries = at.sums(halves.reshape(-1, halves.shape[-1]), moves, at.codes.shape[-1])
        return of_queries.addcmul_(at.keys.view(-1, halves.shape[-1]), kept).view(at.keys.shape)
    rows, factor = _gradient_rows(halves, at, use, found)
    if options.clip:
        return at.keys - options.lr * (factor * rows).clamp_(-1, 1).view(at.keys.shape)
    return torch.add(at.keys, rows.view(at.keys.shape), alpha=-options.lr * factor)


def _gradient_rows(halves: Tensor, at: Addresses, use: Use, found: Tensor | None) -> tuple[Tensor, float]:
    """The step's gradient on the keys, as rows (A*n,K/2) and a factor."""
    if at.inverse is None:
        return at.sums(halves.reshape(-1, halves.shape[-1]), use.on_scores, at.codes.shape[-1]), 1.0
    # s = -log(eps + d), d = |key - q|^2: ds/dkey = -2 (key - q) / (eps + d).
    return _sums_of_differences(halves, at, use.on_scores * at.inverse, found), -2.0


def _sums_of_differences(halves: Tensor, at: Addresses, weights: Tensor, found: Tensor | None) -> Tensor:
    """sum of weights (A,S,k) times key - q over a sub-key's accesses (A*n,K/2); apart where ``found`` is not formed."""
    half_dim = halves.shape[-1]
    if found is not None:
        return at.sums(found.view(-1, half_dim), weights)
    on_keys = at.sums(weights.view(-1, 1), None)
    of_queries = at.sums(halves.reshape(-1, half_dim), weights, at.codes.shape[-1])
    return of_queries.neg_().addcmul_(at.keys.view(-1, half_dim), on_keys)


def key_step_backward(
    halves: Tensor,
    at: Addresses,
    use: Use,
    found: Tensor | None,
    d_new_keys: Tensor,
    n_memories: int,
    options: ChunkOptions,
) -> StepGradients:
    """Derivatives through :func:`key_step`, given that of the keys after it (A,n,K/2).

    With gs the gradient on the scores, u = gs / (eps + d), G = -lr dnew the derivative of the step's gradient on keys:

        dkeys_x = dnew_x - 2 G_x sum u;  dq = 2 sum u G;  du = -2 <G_x, key_x - q>;  dgs = du / (eps + d)
        gs = P (slope - <P, slope>), slope a function of Pbar = mean P: softmax backward, its Hessian, and the mean
    """
    o, half_dim = options, halves.shape[-1]
    gs, codes = use.on_scores, at.codes.view(-1, at.codes.shape[-1])
    d_new_keys = d_new_keys.view(-1, half_dim)
    on_rows = d_new_keys * -o.lr
    if o.clip:
        rows, factor = _gradient_rows(halves, at, use, found)
        on_rows = on_rows * ((factor * rows).abs() <= 1)
    if found is None:
        # <G_x, q> of every access.
        of_queries = gather_dot(on_rows, codes, halves.reshape(-1, half_dim)).view(gs.shape)
    through_distances = None
    if at.inverse is not None:
        u = gs * at.inverse
        if found is None:
            du = (at.gather(torch.linalg.vecdot(on_rows, at.keys.view(-1, half_dim))) - of_queries) * -2
        else:
            # <G, differences> and the accesses' sums share nothing: one access, one row of differences.
            every = _arange(codes.numel(), codes)
            du = dots(on_rows, codes.flatten(), found.view(-1, half_dim), every).view(gs.shape) * -2
        d_gs = du * at.inverse
        through_distances = du * u
        d_halves = gather_sum(on_rows, codes, u * 2)
        d_keys = torch.addcmul(d_new_keys, on_rows, at.sums(u.view(-1, 1), None), value=-2)
    else:
        d_gs = of_queries
        d_halves = gather_sum(on_rows, codes, gs)
        d_keys = d_new_keys

    p = use.weights
    slope = at.gather(_to_heads(_slope(use.mean, at, n_memories, o), at))
    p_d_gs = p * d_gs
    summed = p_d_gs.sum(-1, keepdim=True)
    on_slope = torch.addcmul(p_d_gs, p, summed, value=-1)
    d_mean = _slope_derivative(use.mean, at, n_memories, o) * _over_heads(
        at.sums(on_slope.view(-1, 1), None), at, n_memories
    )
    # d gs / d P at a fixed slope; what is the same for a half's k scores falls out in the softmax's backward.
    d_p = d_gs * (slope - (p * slope).sum(-1, keepdim=True)) - slope * summed
    d_p += at.gather(_to_heads(d_mean / _n_entries(at, n_memories), at))
    return StepGradients(d_halves.view(halves.shape), d_keys, softmax_backward(p, d_p), through_distances, d_gs)


def address_backward(
    halves: Tensor,
    at: Addresses,
    found: Tensor | None,
    step: StepGradients | None,
    d_scores: Tensor,
    needs_keys: bool,
    options: ChunkOptions,
) -> tuple[Tensor, Tensor | None]:
    """Derivatives of halves (A,S,K/2) and keys (A,n,K/2) through :func:`address`, given those of the scores (A,S,k)
    and those of the key step (None: the keys did not move, or nothing depends on where they went)."""
    half_dim, n_read = halves.shape[-1], at.codes.shape[-1]
    codes, keys = at.codes.view(-1, n_read), at.keys.view(-1, half_dim)
    if step is not None:
        d_scores = d_scores + step.scores
    if at.inverse is None:
        d_halves = gather_sum(keys, codes, d_scores)
        d_keys = at.sums(halves.reshape(-1, half_dim), d_scores, n_read) if needs_keys else None
    else:
        if step is not None:
            d_scores = d_scores + step.through_distances
        slope = d_scores * at.inverse * -2
        if found is None:
            flat = halves.reshape(-1, half_dim)
            d_halves = gather_sum(keys, codes, slope.neg()).addcmul_(flat, slope.sum(-1).view(-1, 1))
        else:
            rows = found.view(-1, half_dim)
            d_halves = gather_sum(rows, _arange(rows.shape[0], codes).view(codes.shape), slope.neg())
        d_keys = _sums_of_differences(halves, at, slope, found) if needs_keys else None
    d_halves = d_halves.view(halves.shape)
    if step is None:
        return d_halves, None if d_keys is None else d_keys.view(at.keys.shape)
    d_halves += step.halves
    return d_halves, None if d_keys is None else d_keys.add_(step.keys).view(at.keys.shape)


class Choice(NamedTuple):
    """The slots that queries read. pairs (G,M,H,S,k): the chosen sums, position1 * k + position2 within the two halves'
    lists. slots (G,M*S,J) int64 and weights (G,M*S,J): softmax over the J scores of a token, at the temperature."""

    pairs: Tensor
    slots: Tensor
    weights: Tensor


def choose(chunks: list[Addresses], n_memories: int, options: ChunkOptions) -> Choice:
    """The k best sums of one score of each half, for chunks of equal length at once."""
    n_halves, n_subkeys, _ = chunks[0].keys.shape
    top_k = options.top_k
    by_half = (len(chunks), n_memories, n_halves // (2 * n_memories), 2, -1, top_k)
    scores1, scores2 = torch.stack([at.scores for at in chunks]).view(by_half).unbind(3)
    subkeys1, subkeys2 = torch.stack([at.codes for at in chunks]).view(by_half).remainder_(n_subkeys).unbind(3)
    sums = (scores1.unsqueeze(-1) + scores2.unsqueeze(-2)).flatten(-2)
    best, pairs = sums.topk(top_k, dim=-1)
    first, second = _positions(pairs, top_k)
    slots = torch.add(subkeys2.gather(-1, second), subkeys1.gather(-1, first), alpha=n_subkeys)
    weights = torch.softmax(_by_token(best) / options.temperature, dim=-1)
    return Choice(pairs, _by_token(slots), weights)


def choose_backward(choice: Choice, d_weights: Tensor, options: ChunkOptions) -> Tensor:
    """Derivatives of the scores (G,A,S,k) through :func:`choose`, given those of the weights (G,M*S,J)."""
    return pairs_to_halves(softmax_backward(choice.weights, d_weights) / options.temperature, choice.pairs)


def pairs_to_halves(on_pairs: Tensor, pairs: Tensor) -> Tensor:
    """Derivatives on pair scores (G,M*S,J) summed onto the halves' scores (G,A,S,k): a pair's score is their sum."""
    n_chunks, n_memories, n_heads, n_queries, top_k = pairs.shape
    on_pairs = on_pairs.view(n_chunks, n_memories, n_queries, n_heads, top_k).transpose(2, 3).unsqueeze(-2)
    positions = torch.arange(top_k, device=pairs.device).unsqueeze(-1)
    halves = [(on_pairs * (at.unsqueeze(-2) == positions)).sum(-1) for at in _positions(pairs, top_k)]
    return torch.stack(halves, dim=3).view(n_chunks, -1, n_queries, top_k)


def halves_to_pairs(on_halves: Tensor, pairs: Tensor) -> Tensor:
    """The transpose of :func:`pairs_to_halves`: (G,A,S,k) -> (G,M*S,J)."""
    on_halves = on_halves.view(*pairs.shape[:3], 2, *pairs.shape[3:])
    first, second = _positions(pairs, pairs.shape[-1])
    return _by_token(on_halves[:, :, :, 0].gather(-1, first) + on_halves[:, :, :, 1].gather(-1, second))


def _positions(pairs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    first = pairs.div(top_k, rounding_mode="floor")
    return first, torch.sub(pairs, first, alpha=top_k)


def _by_token(x: Tensor) -> Tensor:
    """(G,M,H,S,k) -> (G,M*S,J)."""
    n_chunks, n_memories, n_heads, n_queries, top_k = x.shape
    return x.transpose(2, 3).reshape(n_chunks, n_memories * n_queries, n_heads * top_k)


def softmax_backward(weights: Tensor, d_weights: Tensor) -> Tensor:
    """Derivative of the scores where weights = softmax(scores) over the last dimension."""
    weighted = weights * d_weights
    return torch.addcmul(weighted, weights, weighted.sum(-1, keepdim=True), value=-1)


def _n_entries(at: Addresses, n_memories: int) -> int:
    """How many P a memory's Pbar is the mean of: S*H."""
    return at.codes.shape[0] // (2 * n_memories) * at.codes.shape[1]


def _over_heads(on_keys: Tensor, at: Addresses, n_memories: int) -> Tensor:
    """(A*n,...) -> (M,2,n), summed over the heads."""
    return on_keys.view(n_memories, -1, 2, at.keys.shape[1]).sum(1)


def _to_heads(on_mean: Tensor, at: Addresses) -> Tensor:
    """(M,2,n) -> (A*n,): the same for every head."""
    n_memories, _, n_subkeys = on_mean.shape
    n_heads = at.keys.shape[0] // (2 * n_memories)
    return on_mean.unsqueeze(1).expand(n_memories, n_heads, 2, n_subkeys).reshape(-1)


def _slope(mean: Tensor, at: Addresses, n_memories: int, options: ChunkOptions) -> Tensor:
    """d A / d P of any access to a sub-key (M,2,n)."""
    shifted = mean + ENTROPY_EPS
    return (torch.log(shifted) + mean / shifted) * (options.address_weight / _n_entries(at, n_memories))


def _slope_derivative(mean: Tensor, at: Addresses, n_memories: int, options: ChunkOptions) -> Tensor:
    """d slope / d Pbar (M,2,n): (1 / x + eps / x^2) with x = Pbar + eps, times the slope's factor."""
    inverse = (mean + ENTROPY_EPS).reciprocal_()
    return (inverse + ENTROPY_EPS * inverse.square()) * (options.address_weight / _n_entries(at, n_memories))


def _arange(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)
