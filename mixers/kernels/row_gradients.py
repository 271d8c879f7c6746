"""Derivatives of a static memory's read, row by row of the table, each over its accesses in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.launch import launch

# Accesses of a row that one program sums; longer lists are cut at the multiples of LONG.
LONG = 256


@triton.jit
def sum_accesses(
    begin, end, row, tokens, weights, order, dots, v_index,
    N_READ: tl.constexpr, VALUE: tl.constexpr, SUMS: tl.constexpr, DOTS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Over the accesses p at the sorted positions begin..end: sum_p weights_p tokens_p; dots_p = <row, tokens_p>."""
    inside = v_index < VALUE
    total = tl.zeros(v_index.shape, dtype=tokens.dtype.element_ty)
    for first in range(begin, end, BLOCK_E):
        position = first + tl.arange(0, BLOCK_E)
        listed = position < end
        access = tl.load(order + position, listed, 0)
        at = (access // N_READ)[:, None] * VALUE + v_index[None, :]
        rows = tl.load(tokens + at, listed[:, None] & inside[None, :], 0.0)
        if SUMS:
            weight = tl.load(weights + access, listed, 0.0)
            total += tl.sum(weight[:, None] * rows, axis=0)
        if DOTS:
            tl.store(dots + access, tl.sum(rows * row[None, :], axis=1), listed)
    return total


@triton.jit(do_not_specialize=["n_accesses"])
def long_rows_kernel(
    table,  # (M*N,V)
    tokens,  # (M*S,V)
    weights,  # (E,)
    order,  # (E,) int64
    codes,  # (E,) the row of each position, ascending
    offsets,  # (M*N + 1,) int64
    partial,  # out (2 * n_pieces,V), SUMS only
    dots,  # out (E,), DOTS only
    n_accesses,
    N_READ: tl.constexpr,
    VALUE: tl.constexpr,
    SUMS: tl.constexpr,
    DOTS: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    first = tl.program_id(0) * LONG
    last = tl.minimum(first + LONG, n_accesses) - 1
    # A piece touches two long lists at most: that of its first position and that of its last.
    which = tl.program_id(1)
    table_row = tl.load(codes + tl.where(which == 0, first, last)).to(tl.int64)
    begin, end = tl.load(offsets + table_row), tl.load(offsets + table_row + 1)
    if (end - begin > LONG) & ((which == 0) | (begin > first)):
        v_index = tl.arange(0, BLOCK_V)
        inside = v_index < VALUE
        row = tl.load(table + table_row * VALUE + v_index, inside, 0.0) if DOTS else v_index
        total = sum_accesses(
            tl.maximum(begin, first), tl.minimum(end, last + 1), row, tokens, weights, order, dots, v_index,
            N_READ, VALUE, SUMS, DOTS, BLOCK_E,
        )  # fmt: skip
        if SUMS:
            tl.store(partial + (tl.program_id(0).to(tl.int64) * 2 + which) * VALUE + v_index, total, inside)


@triton.jit
def row_gradients_kernel(
    table,  # (M*N,V)
    tokens,  # (M*S,V)
    weights,  # (E,)
    order,  # (E,) int64
    offsets,  # (M*N + 1,) int64
    partial,  # (2 * n_pieces,V), SUMS only
    d_table,  # out (M*N,V), SUMS only
    dots,  # out (E,), DOTS only
    N_READ: tl.constexpr,
    VALUE: tl.constexpr,
    SUMS: tl.constexpr,
    DOTS: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    table_row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + table_row), tl.load(offsets + table_row + 1)
    v_index = tl.arange(0, BLOCK_V)
    inside = v_index < VALUE
    row = tl.load(table + table_row * VALUE + v_index, inside, 0.0) if DOTS else v_index
    if end - begin <= LONG:
        total = sum_accesses(begin, end, row, tokens, weights, order, dots, v_index, N_READ, VALUE, SUMS, DOTS, BLOCK_E)
    else:
        total = tl.zeros((BLOCK_V,), dtype=tokens.dtype.element_ty)
        if SUMS:
            first = begin // LONG
            for piece in range(first, (end - 1) // LONG + 1, BLOCK_E):
                pieces = piece + tl.arange(0, BLOCK_E)
                # Only the first piece of a list may begin with another list.
                which = tl.where((pieces == first) & (begin % LONG != 0), 1, 0)
                listed = pieces * LONG < end
                at = (pieces * 2 + which)[:, None] * VALUE + v_index[None, :]
                total += tl.sum(tl.load(partial + at, listed[:, None] & inside[None, :], 0.0), axis=0)
    if SUMS:
        tl.store(d_table + table_row * VALUE + v_index, total, inside)


def row_gradients(
    table: Tensor, slots: Tensor, weights: Tensor, tokens: Tensor, *, sums: bool, dots: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Both derivatives of a read of table (M,N,V) at slots (M,S,J) with weights (M,S,J), whose own is tokens (M,S,V).

    sums: (M,N,V), row u the sum over the accesses (t,j) -> u of weights_tj tokens_t. dots: (M,S,J) = <table[slot_tj],
    tokens_t>. Only what is asked for. One stable sort puts the accesses in the order of the rows, so that each row of
    the table is read once and its derivative written once, zeros included; the tokens' rows are gathered for each
    access. A row that many tokens read is summed in pieces by several programs.

    Bytes: M N V read (dots) and written (sums), 4 passes over 12 E for the sort; E V from the L2 cache.
    """
    n_memories, n_table, value_dim = table.shape
    n_read, n_accesses = slots.shape[-1], slots.numel()
    n_rows = n_memories * n_table
    assert n_accesses < 2**31, "accesses are counted in 32 bits"
    codes = slots
    if n_memories > 1:
        codes = slots + torch.arange(n_memories, device=slots.device).view(-1, 1, 1) * n_table
    kind = torch.int32 if n_rows < 2**31 else torch.int64
    codes, order = torch.sort(codes.flatten().to(kind), stable=True)
    offsets = torch.searchsorted(codes, torch.arange(n_rows + 1, dtype=kind, device=slots.device))
    width, n_pieces = triton.next_power_of_2(value_dim), triton.cdiv(n_accesses, LONG)
    d_table = torch.empty_like(table) if sums else None
    products = torch.empty_like(weights) if dots else None
    # What isn't asked for is not written.
    partial = tokens.new_empty(2 * n_pieces, value_dim) if sums else tokens
    to_table, to_products = tokens if d_table is None else d_table, weights if products is None else products
    constants = {
        "N_READ": n_read,
        "VALUE": value_dim,
        "SUMS": sums,
        "DOTS": dots,
        "LONG": LONG,
        "BLOCK_E": max(1, 1024 // width),
        "BLOCK_V": width,
        "num_warps": max(1, min(4, width // 256)),
    }
    given = (table, tokens, weights, order)
    launch(long_rows_kernel, (n_pieces, 2), *given, codes, offsets, partial, to_products, n_accesses, **constants)
    launch(row_gradients_kernel, (n_rows,), *given, offsets, partial, to_table, to_products, **constants)
    return d_table, products
