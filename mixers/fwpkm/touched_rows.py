"""Copy on write: the value rows that a memory has touched, over a table that nobody changes.

Many memories start from one table of N rows, and each soon differs from it in some of them. Row ``slot`` of memory m
has the code m * N + slot. A memory is then the shared table and a pair (codes (U,), rows (U,V)): what differs.
Time and memory follow the rows touched, not the size of the table, save for 4 bytes a slot and memory while a call
writes.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TouchedRows:
    """The rows that one call touches, in the order in which they were met: a private copy, written in place.

    base: (1 or M,N,V), never written. codes (U,) ascending and rows (U,V): what differs from it already. For each
    chunk: ``find``, ``take``, and ``put`` if it writes. The rows that a chunk meets first have the highest places, one
    after another, so they come from the base and go into the table without a pass over the table in between.
    """

    def __init__(self, base: Tensor, n_memories: int, codes: Tensor, rows: Tensor, n_accesses: int) -> None:
        self.base = base.flatten(0, 1)
        self.n_given = self.n_rows = self.n_before = codes.numel()
        n_codes = n_memories * base.shape[1]
        capacity = min(self.n_given + n_accesses, n_codes)
        self.table = rows.new_empty(capacity, rows.shape[1])
        self.table[: self.n_given] = rows
        self.codes = [codes]
        self.place = torch.full((n_codes,), -1, dtype=torch.int32, device=codes.device)
        self.place[codes] = torch.arange(self.n_given, dtype=torch.int32, device=codes.device)

    def find(self, codes: Tensor) -> Tensor:
        """Where the rows that a chunk accesses stand in the table: codes (S,J) -> places (S,J) int64."""
        places = self.place[codes]
        new = torch.unique(codes[places < 0])
        self.codes.append(new)
        self.n_before, self.n_rows = self.n_rows, self.n_rows + new.numel()
        if new.numel():
            self.place[new] = torch.arange(self.n_before, self.n_rows, dtype=torch.int32, device=codes.device)
            places = self.place[codes]
        return places.long()

    def take(self, places: Tensor, room: Tensor) -> Tensor:
        """The chunk's rows (U,V) as they are now, copied into ``room``, for its distinct ``places`` (U,) ascending."""
        n_old = self._n_old(places)
        found = room[: places.numel()]
        torch.index_select(self.table, 0, places[:n_old], out=found[:n_old])
        torch.index_select(self.base, 0, base_rows(self.codes[-1], self.base), out=found[n_old:])
        return found

    def put(self, places: Tensor, before: Tensor, changes: Tensor) -> None:
        """Write ``before`` + ``changes`` (U,V), where before is what :meth:`take` gave for these ``places``."""
        n_old = self._n_old(places)
        self.table.index_copy_(0, places[:n_old], before[:n_old] + changes[:n_old])
        torch.add(before[n_old:], changes[n_old:], out=self.table[self.n_before : self.n_rows])

    def _n_old(self, places: Tensor) -> int:
        return places.numel() - (self.n_rows - self.n_before)

    def met(self) -> tuple[Tensor, Tensor]:
        """codes (U,) in the order in which they were met, the given ones first, and rows (U,V): views."""
        return torch.cat(self.codes), self.table[: self.n_rows]


class UntouchedRows:
    """The same for a call that only reads, once: nothing of the table or of the given rows is copied but what is read.

    Any single token is such a call, unless it ends a chunk, so its cost must depend neither on N nor on U.
    """

    def __init__(self, base: Tensor, codes: Tensor, rows: Tensor) -> None:
        self.base, self.given_codes, self.rows = base.flatten(0, 1), codes, rows
        self.n_given = codes.numel()
        self.codes = [codes]

    def find(self, codes: Tensor) -> Tensor:
        """Places of the ``codes`` (S,J), (S,J): among the given rows, or behind them in ascending order."""
        if self.n_given:
            places = torch.searchsorted(self.given_codes, codes).clamp_(max=self.n_given - 1)
            missing = self.given_codes[places] != codes
        else:
            places, missing = torch.zeros_like(codes), torch.ones_like(codes, dtype=torch.bool)
        new, index = torch.unique(codes[missing], return_inverse=True)
        places[missing] = self.n_given + index
        self.codes.append(new)
        return places

    def take(self, places: Tensor, room: Tensor) -> Tensor:
        """The rows (U,V), copied into ``room``, for the distinct ``places`` (U,) ascending."""
        new = self.codes[-1]
        n_old = places.numel() - new.numel()
        return restore(self.rows[places[:n_old]], new, self.base, room)

    def met(self) -> tuple[Tensor, Tensor]:
        """Nothing is touched by reading: the given codes and rows."""
        return self.given_codes, self.rows


def restore(old: Tensor, new: Tensor, base: Tensor, room: Tensor) -> Tensor:
    """``old`` (U',V) and the rows of the flattened ``base`` from which the codes ``new`` start: (U,V), in ``room``."""
    n_old = old.shape[0]
    found = room[: n_old + new.numel()]
    found[:n_old] = old
    torch.index_select(base, 0, base_rows(new, base), out=found[n_old:])
    return found


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
