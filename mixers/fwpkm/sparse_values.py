"""The write to the touched value rows and what the value loss says to the keys, forward and backward, written out.

Letters: S tokens of a chunk (all memories), J accesses per token, E accesses of some chunks, D distinct pairs of chunk
and row, I accesses to rows that have a derivative, U rows of a chunk, P places, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixers.fwpkm.sparse_keys import softmax_backward
from mixers.fwpkm.sparse_rows import bag_sums, dots, gather_dot, gather_sum
from mixers.fwpkm.touched_rows import Block, Plan, Span


class Shares(NamedTuple):
    """How the accesses (E,) of chunks change rows, in the order of their plan.

    weights: a. moves: a times -lr * scale / cnt of their rows. A row changes by the sum of moves * errors; with
    ``clip``, its gradient is that over -lr, cut to +-1.
    """

    weights: Tensor
    moves: Tensor


def row_changes(error: Tensor, block: Block, lr: float, clip: bool) -> Tensor:
    """What a chunk adds to a block of its rows (U,V); error (S,V), zero for tokens that write nothing."""
    changes = bag_sums(error, block.token, block.starts, block.moves)
    return changes.clamp_(-lr, lr) if clip else changes


def unclipped(error: Tensor, shares: Shares, plan: Plan, span: Span, lr: float) -> Tensor:
    """Where a chunk's changes (U,V) stay within what ``clip`` allows: 1 there, else 0."""
    here, rows = slice(span.entry, span.entry_stop), slice(span.row, span.row_stop)
    changes = bag_sums(error, plan.token[here], plan.starts[rows] - span.entry, shares.moves[here])
    return (changes.abs() <= lr).to(error.dtype)


class Later(NamedTuple):
    """Of the accesses of some chunks, those to rows whose derivative after the chunk may differ from zero.

    entry: (I,) which of the E accesses, in the order of the tokens. place: (I,) where that derivative stands. starts:
    (n+1,) where each token's begin. bounds: where each chunk's do.
    """

    entry: Tensor
    place: Tensor
    starts: Tensor
    bounds: list[int]


def later_accesses(
    plan: Plan, spans: list[Span], n_written: int, n_read: int, place: Tensor, n_places: int, all_rows: bool
) -> Later:
    """The accesses to rows that a later chunk of the plan touches, or to all that its first ``n_written`` chunks touch;
    ``place`` (D,): of each row's derivative."""
    n_entries, n_rows = plan.index.numel(), plan.rows.numel()
    if all_rows:
        # What a chunk that does not write reads has no derivative after it, and such a chunk is the last.
        entry = torch.arange(spans[n_written - 1].entry_stop if n_written else 0, device=place.device)
    else:
        number = torch.arange(n_rows, device=place.device)
        last = torch.zeros(n_places, dtype=torch.int64, device=place.device)
        last.scatter_reduce_(0, plan.rows, number, "amax")
        entry = (last.index_select(0, plan.rows) > number).index_select(0, plan.index).nonzero().squeeze(1)
    tokens = torch.arange(n_entries // n_read + 1, device=place.device)
    starts = torch.searchsorted(entry, tokens * n_read)
    at = torch.tensor([span.entry // n_read for span in spans] + [n_entries // n_read], device=place.device)
    of_entry = place.index_select(0, plan.index.index_select(0, entry))
    return Later(entry, of_entry, starts, starts.index_select(0, at).tolist())


class WriteGradients(NamedTuple):
    """Derivatives through :func:`row_changes`: of error (S,V), and of the products of weights and factors (I,), for the
    chunk's part of :class:`Later`."""

    error: Tensor
    shares: Tensor


def row_changes_backward(
    d_table: Tensor,
    later: Later,
    chunk: int,
    error: Tensor,
    shares: Tensor,
    span: Span,
    n_read: int,
    inside: Tensor | None,
    rows: Tensor | None,
) -> WriteGradients:
    """Given the derivatives d_table (P,V) of rows after a chunk; shares (I,) the products of weights and factors of all
    of :class:`Later`. With ``clip``: inside (U,V) of :func:`unclipped`, and rows (I,) the row, of U, of each access."""
    here = slice(later.bounds[chunk], later.bounds[chunk + 1])
    first, stop = span.entry // n_read, span.entry_stop // n_read
    place = later.place[here]
    if inside is not None:
        d_table = d_table.index_select(0, place) * inside.index_select(0, rows[here])
        place = torch.arange(place.numel(), device=place.device)
    token = later.entry[here].div(n_read, rounding_mode="floor") - first
    d_error = bag_sums(d_table, place, later.starts[first:stop] - later.bounds[chunk], shares[here])
    return WriteGradients(d_error, dots(d_table, place, error, token))


def value_loss_on_pairs(table: Tensor, index: Tensor, error: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """d loss / d pair scores (S,J) of 0.5 mean_pairs[g m mean_V (read - v)^2]; error (S,V) is d loss / d read, table
    (P,V) holds at index (S,J) what was read."""
    return softmax_backward(weights, gather_dot(table, index, error)) / temperature


def value_loss_on_pairs_backward(
    d_pairs: Tensor,
    before: Tensor,
    error: Tensor,
    weights: Tensor,
    index: Tensor,
    plan: Plan,
    span: Span,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of before (U,V), error (S,V) and weights (S,J) through :func:`value_loss_on_pairs` with the chunk's
    rows ``before`` as the table."""
    on_weights = gather_dot(before, index, error)
    d_pairs = d_pairs / temperature
    mean = (weights * d_pairs).sum(-1, keepdim=True)
    d_on_weights = weights * (d_pairs - mean)
    d_weights = d_pairs * (on_weights - (weights * on_weights).sum(-1, keepdim=True)) - on_weights * mean
    here = slice(span.entry, span.entry_stop)
    in_order = d_on_weights.flatten().index_select(0, plan.order[here] - span.entry)
    d_before = bag_sums(error, plan.token[here], plan.starts[span.row : span.row_stop] - span.entry, in_order)
    return d_before, gather_sum(before, index, d_on_weights), d_weights
