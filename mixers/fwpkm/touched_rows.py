"""Copy on write: the value rows that a memory has touched, over a table that nobody changes.

Many memories start from one table of N rows, and each soon differs from it in some of them. Row ``slot`` of memory m
has the code m * N + slot. A memory is then the shared table and a pair (codes (U,), rows (U,V)): what differs.
Time and memory follow the rows touched, not the size of the table.

Letters: M memories, N slots, S tokens of a chunk (of all memories), J accesses per token, E accesses of some chunks,
one chunk after another, D distinct pairs of chunk and row, U rows, V width of a row.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mixers.fwpkm.kept_memory import LARGE_BYTES, room_for
from mixers.fwpkm.sparse_rows import bag_sums, first_of_runs, gather_sum, stable_order, stable_sort

BLOCK_BYTES = 2 * 2**20


class Span(NamedTuple):
    """Where a chunk lies in a :class:`Plan`: its accesses entry..entry_stop, of which those before entry_new, in sorted
    order, go to rows that were met before; its rows row..row_stop, those met before up to row_new; the places of its
    new rows, new..new_stop."""

    entry: int
    entry_new: int
    entry_stop: int
    row: int
    row_new: int
    row_stop: int
    new: int
    new_stop: int


class Plan(NamedTuple):
    """Which rows the accesses of some chunks go to. Rows have places in the order in which they are met: those known
    before first, then each chunk's new ones in the order of their codes.

    places: (E,) of each access. order: (E,) the accesses by chunk, row, token; a chunk's rows are those met before and
    then the new ones, which come in the order of their places. token: (E,) the token, within its chunk, of each access
    in that order. index: (E,) the row (of the D) of each access, not in that order. rows: (D,) the places of each
    chunk's rows. starts: (D,) where each row's accesses begin in ``order``.
    counts: (D,) how many they are. new_codes: (U,) codes of the new rows.
    """

    places: Tensor
    order: Tensor
    token: Tensor
    index: Tensor
    rows: Tensor
    starts: Tensor
    counts: Tensor
    new_codes: Tensor


def plan(codes: Tensor, n_each: list[int], n_read: int, known: Tensor) -> tuple[Plan, list[Span]]:
    """The plan of chunks with ``n_each`` accesses, as many in all but the last, and ``n_read`` per token: codes (E,) of
    the accesses, known (U,) of the rows met before, at places 0..U-1. One sort by code, for all chunks at once."""
    n_known, n_chunks = known.numel(), len(n_each)
    chunk = _chunk_ids(n_each, codes)
    in_order, order = stable_sort(torch.cat([known, codes]) if n_known else codes)
    is_first = first_of_runs(in_order)
    run_starts, run = is_first.nonzero().squeeze(1), is_first.cumsum(0).sub_(1)
    first_met = order.index_select(0, run_starts)
    # The chunk that meets a row first, counted from 1; 0 for rows known before.
    if n_known:
        met_in = chunk.index_select(0, (first_met - n_known).clamp_(min=0)).add_(1).masked_fill_(first_met < n_known, 0)
    else:
        met_in = chunk.index_select(0, first_met).add_(1)
    as_met = stable_order(met_in, n_chunks + 1)
    place_of_run = torch.empty_like(as_met).scatter_(0, as_met, torch.arange(as_met.numel(), device=codes.device))
    if n_known:
        place_of_run = torch.where(met_in == 0, first_met, place_of_run)
    places = torch.empty_like(order).scatter_(0, order, place_of_run.index_select(0, run))[n_known:]
    new_codes = in_order.index_select(0, run_starts.index_select(0, as_met[n_known:]))
    n_new = torch.bincount(met_in, minlength=n_chunks + 1)[1:]
    if n_known:
        is_access = (order >= n_known).nonzero().squeeze(1)
        order, run = order.index_select(0, is_access).sub_(n_known), run.index_select(0, is_access)
    # By chunk, rows met before first; by code they are in order already.
    chunk_of = chunk.index_select(0, order)
    by_chunk = stable_order(chunk_of * 2 + (met_in.index_select(0, run) > chunk_of), 2 * n_chunks)
    order, run = order.index_select(0, by_chunk), run.index_select(0, by_chunk)
    is_first = first_of_runs(torch.add(run, chunk, alpha=as_met.numel()))
    return _group(places, order, is_first, chunk, n_each, n_read, new_codes, n_new, n_known)


def plan_reads(codes: Tensor, n_read: int, known: Tensor) -> tuple[Plan, list[Span]]:
    """The plan of one chunk that only reads, where ``known`` (U,) are ascending: it costs the same however many."""
    n_known = known.numel()
    if n_known:
        places = torch.searchsorted(known, codes).clamp_(max=n_known - 1)
        missing = known[places] != codes
    else:
        places, missing = torch.zeros_like(codes), torch.ones_like(codes, dtype=torch.bool)
    new_codes, index = torch.unique(codes[missing], return_inverse=True)
    places[missing] = n_known + index
    n_new = torch.full((1,), new_codes.numel(), device=codes.device)
    n_each = [codes.numel()]
    in_order, order = stable_sort(places)
    chunk = _chunk_ids(n_each, codes)
    return _group(places, order, first_of_runs(in_order), chunk, n_each, n_read, new_codes, n_new, n_known)


def _chunk_ids(n_each: list[int], like: Tensor) -> Tensor:
    """(E,): the chunk of each access. All chunks but the last are equally long."""
    return torch.arange(like.numel(), device=like.device).div_(n_each[0], rounding_mode="floor")


def _group(
    places: Tensor,
    order: Tensor,
    is_first: Tensor,
    chunk: Tensor,
    n_each: list[int],
    n_read: int,
    new_codes: Tensor,
    n_new: Tensor,
    n_known: int,
) -> tuple[Plan, list[Span]]:
    """The plan of accesses with ``places`` (E,) in their ``order`` (E,); is_first (E,): in that order, of a row."""
    n_chunks, n_entries = len(n_each), places.numel()
    entries = list(accumulate(n_each, initial=0))
    starts = is_first.nonzero().squeeze(1)
    index = torch.empty_like(order).scatter_(0, order, is_first.cumsum(0).sub_(1))
    # The order is chunk by chunk, so an entry's chunk is the same before and after.
    chunk_of_row = chunk.index_select(0, starts)
    all_starts = torch.cat([starts, starts.new_full((1,), n_entries)])
    n_rows = torch.bincount(chunk_of_row, minlength=n_chunks)
    ends = n_rows.cumsum(0)
    entry_new = all_starts.index_select(0, ends - n_new)
    made = Plan(
        places,
        order,
        (order % n_each[0]).div_(n_read, rounding_mode="floor"),
        index,
        places.index_select(0, order.index_select(0, starts)),
        starts,
        all_starts.diff(),
        new_codes,
    )
    spans, row, new = [], 0, n_known
    numbers = torch.stack([n_rows, n_new, entry_new]).tolist()  # the only wait for the device
    for i, (rows_here, new_here, first_new) in enumerate(zip(*numbers, strict=True)):
        row_stop, new_stop = row + rows_here, new + new_here
        spans.append(Span(entries[i], first_new, entries[i + 1], row, row_stop - new_here, row_stop, new, new_stop))
        row, new = row_stop, new_stop
    return made, spans


class Block(NamedTuple):
    """Some of a chunk's rows and the accesses to them. token and moves (I,): of each access, in the order of a
    :class:`Plan`. starts (U,): where each row's accesses begin among these. places: of the rows, (U,) of those met
    before, or the range that new ones take."""

    token: Tensor
    moves: Tensor
    starts: Tensor
    places: Tensor | slice


def blocks(made: Plan, spans: list[Span], moves: Tensor, row_bytes: int) -> list[list[Block]]:
    """The rows of each of a plan's first chunks cut into blocks, those met before first; ``moves`` (E,) in its order.

    On the CPU of so few rows that what is formed for one stays in the caches and is freed and had again without asking
    the system: formed for all rows of a chunk at once, their changes took half of the time of the chain of the rows.
    All are cut at once: slices of each tensor for each block would be 200 small operations more in a call.
    """
    n_most = max(BLOCK_BYTES // row_bytes, 1) if moves.device.type == "cpu" else max(made.starts.numel(), 1)
    found: list[list[Block]] = [[] for _ in spans]
    places: list[tuple[int, Tensor | slice]] = []  # the chunk of each block, and its rows
    edges = []
    for i, span in enumerate(spans):
        for row in range(span.row, span.row_new, n_most):
            places.append((i, made.rows[row : min(row + n_most, span.row_new)]))
            edges.append(row)
        for row in range(span.row_new, span.row_stop, n_most):
            place, n_rows = span.new + row - span.row_new, min(n_most, span.row_stop - row)
            places.append((i, slice(place, place + n_rows)))
            edges.append(row)
    if not edges:
        return found
    first = made.starts.index_select(0, torch.tensor(edges, device=moves.device))
    n_rows = _lengths([*edges, spans[-1].row_stop])
    n_entries = _lengths([*first.tolist(), spans[-1].entry_stop])
    starts = made.starts[: spans[-1].row_stop] - first.repeat_interleave(torch.tensor(n_rows, device=moves.device))
    tokens, moves = made.token[: spans[-1].entry_stop], moves[: spans[-1].entry_stop]
    parts = zip(tokens.split(n_entries), moves.split(n_entries), starts.split(n_rows), places, strict=True)
    for of_token, of_moves, of_starts, (i, rows) in parts:
        found[i].append(Block(of_token, of_moves, of_starts, rows))
    return found


def _lengths(edges: list[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(edges)]


class TouchedRows:
    """The rows that one call touches, at their places: a private copy, written in place.

    base: (1 or M,N,V), never written. codes (U,) ascending and rows (U,V): what differs from it already. n_accesses: of
    the call, n_writing of them of chunks that write. For each of these, in turn: ``read``, and ``add`` for its
    :func:`blocks`; then ``read_only``.
    """

    def __init__(
        self, base: Tensor, n_memories: int, codes: Tensor, rows: Tensor, n_writing: int, n_accesses: int
    ) -> None:
        self.base = base.flatten(0, 1)
        self.codes = codes
        n_given = codes.numel()
        if n_accesses * rows.shape[1] * rows.element_size() >= LARGE_BYTES:
            n_accesses = n_writing
        self.table = room_for((min(n_given + n_accesses, n_memories * base.shape[1]), rows.shape[1]), rows)
        if n_given:
            self.table[:n_given] = rows

    def plan(self, codes: Tensor, n_each: list[int], n_read: int) -> tuple[Plan, list[Span]]:
        """The plan of the next chunks: codes (E,) of their accesses."""
        made, spans = plan(codes, n_each, n_read, self.codes)
        self._first_new = self.codes.numel()
        self._at_base = base_rows(made.new_codes, self.base)
        self.codes = torch.cat([self.codes, made.new_codes]) if self._first_new else made.new_codes
        return made, spans

    def kept(self, made: Plan, span: Span) -> Tensor:
        """A copy of the rows that a chunk touches and that were met before it, (U,V)."""
        return self.table.index_select(0, made.rows[span.row : span.row_new])

    def read(self, made: Plan, span: Span, weights: Tensor) -> Tensor:
        """What tokens with ``weights`` (S,J) read (S,V), after the rows that their chunk meets first have come in."""
        new = self.table[span.new : span.new_stop]
        at_base = self._at_base[span.new - self._first_new : span.new_stop - self._first_new]
        torch.index_select(self.base, 0, at_base, out=new)
        return gather_sum(self.table, made.places[span.entry : span.entry_stop].view(weights.shape), weights)

    def read_only(self, made: Plan, span: Span, weights: Tensor) -> Tensor:
        """The same for a last chunk that does not write: large rows that it meets first are read where they stand."""
        if self.table.shape[0] >= span.new_stop:
            return self.read(made, span, weights)
        places = made.places[span.entry : span.entry_stop]
        is_new = places >= span.new
        new, known = is_new.nonzero().squeeze(1), is_new.logical_not().nonzero().squeeze(1)
        n_new = is_new.view(weights.shape).sum(1)
        first_new = n_new.cumsum(0).sub_(n_new)
        first_known = torch.arange(0, places.numel(), weights.shape[1], device=places.device) - first_new
        at_new = base_rows(self.codes.index_select(0, places.index_select(0, new)), self.base)
        weights = weights.flatten()
        of_new = bag_sums(self.base, at_new, first_new, weights.index_select(0, new))
        at_known = places.index_select(0, known)
        return of_new.add_(bag_sums(self.table, at_known, first_known, weights.index_select(0, known)))

    def add(self, block: Block, changes: Tensor) -> None:
        """Add ``changes`` (U,V) to the rows of a block."""
        if isinstance(block.places, slice):
            self.table[block.places].add_(changes)
        else:
            self.table.index_add_(0, block.places, changes)


class UntouchedRows:
    """The same for a call of one chunk that only reads: nothing is copied but what is read.

    Any single token is such a call, unless it ends a chunk, so its cost must depend neither on N nor on U.
    """

    def __init__(self, base: Tensor, codes: Tensor, rows: Tensor) -> None:
        self.base, self.given, self.codes, self.rows = base.flatten(0, 1), codes, codes, rows

    def plan(self, codes: Tensor, n_each: list[int], n_read: int) -> tuple[Plan, list[Span]]:
        assert len(n_each) == 1, n_each
        made, spans = plan_reads(codes, n_read, self.given)
        self.codes = made.new_codes
        return made, spans

    def kept(self, made: Plan, span: Span) -> Tensor:
        return self.rows.index_select(0, made.rows[: span.row_new])

    def read_only(self, made: Plan, span: Span, weights: Tensor) -> Tensor:
        return gather_sum(
            restore(self.kept(made, span), self.codes, self.base), made.index.view(weights.shape), weights
        )


def restore(old: Tensor, new: Tensor, base: Tensor) -> Tensor:
    """``old`` (U',V) and the rows of the flattened ``base`` from which the codes ``new`` start: (U,V)."""
    return torch.cat([old, base.index_select(0, base_rows(new, base))])


def base_rows(codes: Tensor, base: Tensor) -> Tensor:
    """Rows of the flattened base (N or M*N,V) from which ``codes`` start."""
    return codes % base.shape[0]


def overlay(base: Tensor, codes: Tensor, rows: Tensor, n_memories: int) -> Tensor:
    """The whole memories (M,N,V): ``base`` (1 or M,N,V) with ``rows`` (U,V) at the distinct ``codes`` (U,).

    Differentiable in base and rows. Copies the table M times.
    """
    tables = base.expand(n_memories, *base.shape[1:])
    if not codes.numel():
        return tables
    return tables.reshape(-1, base.shape[2]).index_copy(0, codes, rows).view(tables.shape)


def in_code_order(codes: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """codes ascending, and rows to match: a new copy, the same for every order in which they were met."""
    codes, order = torch.sort(codes)
    return codes, rows.index_select(0, order)
