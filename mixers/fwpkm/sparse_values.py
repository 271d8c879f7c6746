"""The write to the touched value rows and what the value loss says to the keys, forward and backward, written out.

Letters: S tokens of a chunk (all memories), J accesses per token, U rows touched, V value width.
"""

from __future__ import annotations

from torch import Tensor

from mixers.fwpkm.sparse_keys import softmax_backward
from mixers.fwpkm.sparse_rows import Accesses, accesses_of, gather_dot, gather_sum, segment_sum


def row_changes(error: Tensor, weights: Tensor, scale: Tensor, accesses: Accesses, lr: float, clip: bool) -> Tensor:
    """-lr * scale_u * sum_{(t,j) -> u} weights_tj * error_t: what a chunk adds to the rows (U,V).

    error (S,V), zero for tokens that write nothing; weights (S,J); scale (U,), 1/cnt included. clip: the gradient's
    entries to +-1.
    """
    if clip:
        return _row_gradient(error, weights, scale, accesses).clamp_(-1, 1).mul_(-lr)
    # The factor of a row goes into the weights: no other pass over the rows.
    return segment_sum(error, weights * (-lr * scale)[accesses.index], accesses.order, accesses.starts)


def row_changes_backward(
    d_after: Tensor,
    later: Tensor,
    error: Tensor,
    weights: Tensor,
    scale: Tensor,
    accesses: Accesses,
    lr: float,
    clip: bool,
) -> tuple[Tensor, Tensor]:
    """Derivatives of error (S,V) and weights (S,J), given those of the rows after the chunk: ``d_after`` (L,V) for the
    rows at the positions ``later`` (L,) of the chunk's, zero for the others."""
    some = accesses_of(accesses, later)
    factor = -lr * scale
    if clip:
        inside = _row_gradient(error, weights, scale, accesses)[later].abs() <= 1
        on_gradient = d_after * inside * factor[later].unsqueeze(-1)
        return some.gather_sum(on_gradient, weights), some.gather_dot(on_gradient, error, weights.shape[1])
    factor = factor[accesses.index]
    d_weights = some.gather_dot(d_after, error, weights.shape[1]).mul_(factor)
    return some.gather_sum(d_after, weights * factor), d_weights


def _row_gradient(error: Tensor, weights: Tensor, scale: Tensor, accesses: Accesses) -> Tensor:
    return segment_sum(error, weights, accesses.order, accesses.starts).mul_(scale.unsqueeze(-1))


def value_loss_on_pairs(
    before: Tensor, error: Tensor, weights: Tensor, accesses: Accesses, temperature: float
) -> Tensor:
    """d loss / d pair scores (S,J) of 0.5 mean_pairs[g m mean_V (read - v)^2]; error (S,V) is d loss / d read."""
    return softmax_backward(weights, gather_dot(before, accesses.index, error), temperature)


def value_loss_on_pairs_backward(
    d_pairs: Tensor, before: Tensor, error: Tensor, weights: Tensor, accesses: Accesses, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of before (U,V), error (S,V) and weights (S,J) through :func:`value_loss_on_pairs`."""
    on_weights = gather_dot(before, accesses.index, error)
    d_pairs = d_pairs / temperature
    mean = (weights * d_pairs).sum(-1, keepdim=True)
    d_on_weights = weights * (d_pairs - mean)
    d_weights = d_pairs * (on_weights - (weights * on_weights).sum(-1, keepdim=True)) - on_weights * mean
    d_before = segment_sum(error, d_on_weights, accesses.order, accesses.starts)
    return d_before, gather_sum(before, accesses.index, d_on_weights), d_weights
