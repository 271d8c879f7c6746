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

    rows: (U,) int64, the distinct rows, ascending. index: (S,J) int64, position of each access in ``rows``.
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


def group_accesses(rows: Tensor) -> Accesses:
    """Group the accesses to ``rows`` (S,J) int64, with one stable sort."""
    in_order, order = torch.sort(rows.flatten(), stable=True)
    is_first = torch.ones_like(in_order, dtype=torch.bool)
    torch.ne(in_order[1:], in_order[:-1], out=is_first[1:])
    starts = is_first.nonzero().squeeze(1)
    index = torch.empty_like(order)
    index[order] = is_first.cumsum(0) - 1
    n_accesses = starts.new_full((1,), order.numel())
    return Accesses(in_order[starts], index.view(rows.shape), order, torch.cat([starts, n_accesses]))


def gather_sum(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights[s,j] * table[index[s,j]]: table (P,V), index and weights (S,J) -> (S,V)."""
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)


def gather_dot(table: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
    """<table[index[s,j]], tokens[s]>: table (P,V), index (S,J), tokens (S,V) -> (S,J).

    The derivative of :func:`gather_sum` with respect to its weights, where tokens are the derivative of its result.
    """
    n_tokens, n_read = index.shape
    token = torch.arange(n_tokens, device=index.device).repeat_interleave(n_read)
    return _dots(table, index.flatten(), tokens, token).view(n_tokens, n_read)


def _dots(table: Tensor, index: Tensor, tokens: Tensor, token: Tensor) -> Tensor:
    """<table[index[i]], tokens[token[i]]> (I,)."""
    if tokens.is_cuda and tokens.element_size() < 4:  # torch has no such kernel there for narrow types
        return torch.linalg.vecdot(table[index].float(), tokens[token].float()).to(tokens.dtype)
    sum_mode, no_padding = 0, -1
    # The offsets say how the entries fall into bags; ``token`` says the same, and is what a CPU and CUDA go by.
    offsets = token.new_zeros(tokens.shape[0])
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        tokens, table, index, offsets, token, sum_mode, no_padding
    )


def first_rows(accesses: Accesses, n_rows: int) -> Accesses:
    """Only the rows, order and starts of the first ``n_rows`` rows; ``index`` stays that of all."""
    if n_rows == accesses.rows.numel():
        return accesses
    starts = accesses.starts[: n_rows + 1]
    return Accesses(accesses.rows[:n_rows], accesses.index, accesses.order[: int(starts[-1])], starts)


class SomeAccesses(NamedTuple):
    """The accesses of a chunk that go to L of its rows, in the order of the tokens.

    entry: (I,) int64, the accesses s*J + j. token: (I,) int64, their s. index: (I,) int64, the row of each, in 0..L-1.
    """

    entry: Tensor
    token: Tensor
    index: Tensor

    def gather_sum(self, table: Tensor, weights: Tensor) -> Tensor:
        """sum_{i at s} weights[entry_i] * table[index_i]: table (L,V), weights (S,J) -> (S,V)."""
        bags = torch.arange(weights.shape[0], device=table.device)
        offsets = torch.searchsorted(self.token, bags)
        chosen = weights.flatten()[self.entry]
        return F.embedding_bag(self.index, table, offsets, mode="sum", per_sample_weights=chosen)

    def gather_dot(self, table: Tensor, tokens: Tensor, n_read: int) -> Tensor:
        """<table[index_i], tokens[token_i]> at the entries, zero elsewhere: table (L,V), tokens (S,V) -> (S,J)."""
        dots = tokens.new_zeros(tokens.shape[0] * n_read)
        dots[self.entry] = _dots(table, self.index, tokens, self.token)
        return dots.view(-1, n_read)


def accesses_of(accesses: Accesses, rows: Tensor) -> SomeAccesses:
    """The accesses that go to the L rows at the distinct positions ``rows`` (L,) of ``accesses.rows``."""
    position = accesses.rows.new_full(accesses.rows.shape, -1)
    position[rows] = torch.arange(rows.numel(), device=rows.device)
    index = position[accesses.index.flatten()]
    entry = (index >= 0).nonzero().squeeze(1)
    return SomeAccesses(entry, entry.div(accesses.index.shape[1], rounding_mode="floor"), index[entry])


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
