"""Rows of a table that a chunk touches: which, read by weighted sums, written by sums over each row's accesses.

The four operations of the sparse memory on value rows. None forms the (S,J,V) rows of all accesses, none adds to a row
in an order that depends on timing: sums over the accesses of a row run in the order of the tokens.

Letters: S tokens of a chunk, J accesses per token, U rows touched, P rows of a table, V width of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Accesses(NamedTuple):
    """The accesses (S,J) of a chunk, grouped by the row that they go to.

    rows: (U,) int64, the distinct codes, ascending. index: (S,J) int64, position of each access in ``rows``.
    order: (S*J,) int64, the accesses s*J + j sorted by row, earlier tokens first.
    starts: (U+1,) int64; those of row u are order[starts[u]:starts[u+1]].
    """

    rows: Tensor
    index: Tensor
    order: Tensor
    starts: Tensor

    @property
    def counts(self) -> Tensor:
        """(U,) int64: how often each row is accessed."""
        return self.starts.diff()


def group_accesses(codes: Tensor) -> Accesses:
    """Group the accesses ``codes`` (S,J) int64 by code, with one stable sort."""
    in_order, order = torch.sort(codes.flatten(), stable=True)
    is_first = torch.ones_like(in_order, dtype=torch.bool)
    torch.ne(in_order[1:], in_order[:-1], out=is_first[1:])
    starts = is_first.nonzero().squeeze(1)
    index = torch.empty_like(order)
    index[order] = is_first.cumsum(0) - 1
    n_accesses = starts.new_full((1,), order.numel())
    return Accesses(in_order[starts], index.view(codes.shape), order, torch.cat([starts, n_accesses]))


def gather_sum(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights[s,j] * table[index[s,j]]: table (P,V), index and weights (S,J) -> (S,V)."""
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)


def gather_dot(table: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
    """<table[index[s,j]], tokens[s]>: table (P,V), index (S,J), tokens (S,V) -> (S,J).

    The derivative of :func:`gather_sum` with respect to its weights, where tokens are the derivative of its result.
    """
    n_tokens, n_read = index.shape
    offsets = torch.arange(0, n_tokens * n_read, n_read, device=index.device)
    bag_of_access = torch.arange(n_tokens, device=index.device).repeat_interleave(n_read)
    sum_mode, no_padding = 0, -1
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        tokens, table, index.flatten(), offsets, bag_of_access, sum_mode, no_padding
    )
    return dots.view(n_tokens, n_read)


def segment_sum(tokens: Tensor, weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Row u: the sum of weights[s,j] * tokens[s] over its accesses (s,j); tokens (S,V), weights (S,J) -> (U,V).

    ``order`` and ``starts`` are those of :class:`Accesses`; a row without accesses is zero. The transpose of
    :func:`gather_sum`.
    """
    n_read = weights.shape[1]
    token = order if n_read == 1 else order.div(n_read, rounding_mode="floor")
    return F.embedding_bag(
        token, tokens, starts, mode="sum", per_sample_weights=weights.flatten()[order], include_last_offset=True
    )
