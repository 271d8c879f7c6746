"""The write to the touched value rows and what the value loss says to the keys, forward and backward, written out.

Letters: S tokens of a chunk (all memories), J accesses per token, U rows touched, V value width.
"""

from __future__ import annotations

from torch import Tensor

from mixers.fwpkm.sparse_keys import softmax_backward
from mixers.fwpkm.sparse_rows import Accesses, gather_dot, gather_sum, segment_sum


def write_rows(
    before: Tensor, error: Tensor, weights: Tensor, scale: Tensor, accesses: Accesses, lr: float, clip: bool
) -> Tensor:
    """before_u - lr * scale_u * sum_{(t,j) -> u} weights_tj * error_t: the rows (U,V) after the chunk.

    before (U,V); error (S,V), zero for tokens that write nothing; weights (S,J); scale (U,), 1/cnt included.
    clip: the gradient's entries to +-1.
    """
    gradient = _row_gradient(error, weights, scale, accesses)
    if clip:
        gradient = gradient.clamp_(-1, 1)
    return before - gradient.mul_(lr)


def write_rows_backward(
    d_after: Tensor, error: Tensor, weights: Tensor, scale: Tensor, accesses: Accesses, lr: float, clip: bool
) -> tuple[Tensor, Tensor]:
    """Derivatives of error (S,V) and weights (S,J) given that of the rows after (U,V); d before = d after."""
    on_gradient = d_after * (-lr * scale).unsqueeze(-1)
    if clip:
        on_gradient *= _row_gradient(error, weights, scale, accesses).abs() <= 1
    d_error = gather_sum(on_gradient, accesses.index, weights)
    return d_error, gather_dot(on_gradient, accesses.index, error)


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
