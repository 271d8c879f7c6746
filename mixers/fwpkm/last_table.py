"""The table of values after a call of the Triton kernels, made of what the call kept when it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixers.fwpkm.unchanged import changes, require_unchanged
from mixers.kernels.row_steps import last_rows
from mixers.kernels.versions import Accesses


class LastTable:
    """The values (M,N,V) after a call: a table that exists, or the given one and the versions of its rows.

    The call fills it by :meth:`keep`, or is given a whole table. ``place`` is a tensor without memory that stands for
    the table among the call's results: the derivative of the table goes back to it.
    """

    def __init__(self, table: Tensor | None = None) -> None:
        self._table = table
        self.place: Tensor | None = None

    def keep(self, given: Tensor, n_memories: int, slots: Tensor, *versions: Tensor | Accesses) -> None:
        """What the table is made of: ``given`` (1 or M,N,V), slots, and the versions, errors and accesses that
        :func:`last_rows` takes; none of these where there are no tokens."""
        self._parts = (given, slots, versions)
        self._n_memories = n_memories
        self._seen = changes(given), changes(slots)

    @property
    def needs_versions(self) -> bool:
        """Whether the table may still be made of the versions of its rows."""
        return self._table is None

    def table(self) -> Tensor:
        """The values (M,N,V), differentiable as the call was.

        Raises:
            UserError: the given values or the slots were changed in place meanwhile.
        """
        if self._table is None:
            for name, tensor, seen in zip(("values", "out.slots"), self._parts[:2], self._seen, strict=True):
                require_unchanged(name, tensor, seen)
            if self.place is None:
                self._table = self._made()
            else:
                self._table = _Made.apply(self.place, self)
            del self._parts, self.place
        return self._table

    def _made(self) -> Tensor:
        given, slots, versions = self._parts
        if not versions:
            return given.clone(memory_format=torch.contiguous_format)
        out = given.new_empty(self._n_memories, *given.shape[1:])
        last_rows(given, slots, *versions, out)
        return out


class _Made(torch.autograd.Function):
    @staticmethod
    def forward(ctx, _place, last):
        return last._made()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_table):
        return d_table, None
