"""Sums and inner products of rows of a table at given places, none of which forms the rows of all accesses.

Sums over the accesses of a row run in the order of the tokens, never in an order that depends on timing.

Letters: S tokens, J accesses per token, I accesses, U rows touched, P rows of a table, V width of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FEW_CODES = 2048


class Accesses(NamedTuple):
    """The accesses (S,J) of some tokens, grouped by the row that they go to.

    rows: (U,) int64, the distinct rows, ascending.
    order: (S*J,) int64, the accesses s*J + j sorted by row, earlier tokens first.
    starts: (U,) int64, where the accesses of each row begin in ``order``.
    """

    rows: Tensor
    order: Tensor
    starts: Tensor


def group_accesses(rows: Tensor) -> Accesses:
    """Group the accesses to ``rows`` (S,J) int64, with one stable sort."""
    in_order, order = stable_sort(rows.flatten())
    starts = first_of_runs(in_order).nonzero().squeeze(1)
    return Accesses(in_order.index_select(0, starts), order, starts)


def stable_sort(codes: Tensor) -> tuple[Tensor, Tensor]:
    """codes (I,) int64 >= 0 ascending, and where each stood; equal ones stay in their order.

    On the CPU one number holds both, code * I + position, as numpy sorts plain numbers 3 to 4 times faster than torch
    sorts numbers with their positions (I = 4096 to 16384; few numbers don't pay for the division afterwards).
    """
    n_codes = codes.numel()
    if not _is_for_numpy(codes) or n_codes < FEW_CODES:
        return torch.sort(codes, stable=True)
    both = torch.add(torch.arange(n_codes), codes, alpha=n_codes)
    both.numpy().sort()
    in_order = both.div(n_codes, rounding_mode="floor")
    return in_order, torch.sub(both, in_order, alpha=n_codes)


def stable_order(codes: Tensor, n_values: int) -> Tensor:
    """Where the codes (I,) int64, each in 0..n_values-1, stand in ascending order; equal ones stay in theirs.

    On the CPU numpy sorts 16-bit numbers by their digits, in a third of the time of :func:`stable_sort`.
    """
    if not _is_for_numpy(codes) or n_values > 2**16:
        return stable_sort(codes)[1]
    return torch.from_numpy(codes.numpy().astype("uint16").argsort(kind="stable"))


def ascending(codes: Tensor) -> Tensor:
    """Each row of codes (B,I) int64 in ascending order, in a new tensor; by numpy on the CPU, as above."""
    if not _is_for_numpy(codes):
        return codes.sort(1).values
    in_order = codes.clone(memory_format=torch.contiguous_format)
    in_order.numpy().sort(axis=1)
    return in_order


def _is_for_numpy(codes: Tensor) -> bool:
    """Whether these are numbers in this process's memory: not those that only count what a call would cost."""
    return codes.device.type == "cpu" and type(codes) is Tensor and not torch.compiler.is_compiling()


def first_of_runs(in_order: Tensor) -> Tensor:
    """Which entries (I,) of a sorted list are the first of their value: (I,) bool."""
    is_first = torch.ones_like(in_order, dtype=torch.bool)
    torch.ne(in_order[1:], in_order[:-1], out=is_first[1:])
    return is_first


def bag_sums(table: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """Sums of weights[i] * table[index[i]] over bags of consecutive entries: table (P,V), index and weights (I,),
    offsets (U,), where each bag begins -> (U,V). An empty bag's sum is zero. weights None: all 1."""
    # Not F.embedding_bag: its checks cost as much as a small sum.
    return torch.embedding_bag(table, index, offsets, False, 0, False, weights)[0]


def gather_sum(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights[s,j] * table[index[s,j]]: table (P,V), index and weights (S,J) -> (S,V)."""
    offsets = torch.arange(0, index.numel(), index.shape[1], device=index.device)
    return bag_sums(table, index.reshape(-1), offsets, weights.reshape(-1))


def gather_dot(table: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
    """<table[index[s,j]], tokens[s]>: table (P,V), index (S,J), tokens (S,V) -> (S,J).

    The derivative of :func:`gather_sum` with respect to its weights, where tokens are the derivative of its result.
    """
    n_tokens, n_read = index.shape
    token = torch.arange(n_tokens, device=index.device).repeat_interleave(n_read)
    return dots(table, index.reshape(-1), tokens, token).view(n_tokens, n_read)


def dots(table: Tensor, index: Tensor, tokens: Tensor, token: Tensor) -> Tensor:
    """<table[index[i]], tokens[token[i]]>: table (P,V), tokens (S,V), index and token (I,) -> (I,)."""
    if tokens.is_cuda and tokens.element_size() < 4:  # torch has no such kernel there for narrow types
        return torch.linalg.vecdot(table[index].float(), tokens[token].float()).to(tokens.dtype)
    sum_mode, no_padding = 0, -1
    # The offsets say how the entries fall into bags; ``token`` says the same, and is what a CPU and CUDA go by.
    offsets = token.new_zeros(tokens.shape[0])
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        tokens, table, index, offsets, token, sum_mode, no_padding
    )


def segment_sum(tokens: Tensor, weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Row u: the sum of weights[s,j] * tokens[s] over its accesses (s,j); tokens (S,V), weights (S,J) -> (U,V).

    ``order`` and ``starts`` are those of :class:`Accesses`; a row without accesses is zero. The transpose of
    :func:`gather_sum`.
    """
    n_read = weights.shape[1]
    token = order if n_read == 1 else order.div(n_read, rounding_mode="floor")
    return bag_sums(tokens, token, starts, weights.flatten().index_select(0, order))
