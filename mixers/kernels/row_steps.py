"""Steps of the value rows that a chunk read, forward, backward and at the end of a call: one program sums a row's."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import token_of
from mixers.kernels.launch import launch
from mixers.kernels.read import newest_rows, row_alignment
from mixers.kernels.versions import Accesses


@triton.jit
def chunk_access(index, n_rows, n_chunk, n_tokens, start, N_READ: tl.constexpr):
    """Of a chunk's accesses, counted from 0: their number among all of the call, and their memory."""
    query = index // N_READ
    n_queries = n_rows * n_chunk
    memory = query // n_queries
    token = token_of(query % n_queries, memory, n_rows, n_chunk, n_tokens, start)
    return token * N_READ + index % N_READ, memory.to(tl.int64)


@triton.jit
def source_row(access, n_chunk, n_tokens, start, N_READ: tl.constexpr, WHOLE: tl.constexpr):
    """Row of an access's token in (M,R,T,V) if WHOLE, else in one chunk's (M,S,V); below 2^31 accesses."""
    token = access.to(tl.int32) // N_READ
    if not WHOLE:
        token = token // n_tokens * n_chunk + (token % n_tokens - start)
    return token.to(tl.int64)


@triton.jit
def sum_groups(
    access, count, group, v_index, source, shares, order, n_chunk, n_tokens, start,
    N_READ: tl.constexpr, VALUE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """sum over the accesses (t,j) of a group of share_tj source_t, (BLOCK_G,BLOCK_V), for groups of count > 0.

    ``access`` (BLOCK_G,) is the first of its group. Bytes per access: V of source, from the L2 cache. The others of a
    group, few as a rule, are summed group by group, BLOCK_E at a time: a slot read by all tokens of a chunk takes
    S / BLOCK_E steps.
    """
    inside = v_index < VALUE
    active = count > 0
    share = tl.load(shares + access, active, 0.0)
    row = source_row(access, n_chunk, n_tokens, start, N_READ, WHOLE)
    place = source + row[:, None] * VALUE + v_index[None, :]
    total = share[:, None] * tl.load(place, active[:, None] & inside[None, :], 0.0)
    if tl.max(count, axis=0) > 1:
        g = tl.arange(0, BLOCK_G)
        for one in range(BLOCK_G):
            n_one = tl.sum(tl.where(g == one, count, 0), axis=0)
            if n_one > 1:
                first = tl.sum(tl.where(g == one, group, 0), axis=0)
                rest = tl.zeros((BLOCK_V,), dtype=source.dtype.element_ty)
                for done in range(1, n_one, BLOCK_E):
                    e = done + tl.arange(0, BLOCK_E)
                    listed = e < n_one
                    others = tl.load(order + first + e, listed, 0)
                    other_share = tl.load(shares + others, listed, 0.0)
                    other_row = source_row(others, n_chunk, n_tokens, start, N_READ, WHOLE)
                    rows = tl.load(
                        source + other_row[:, None] * VALUE + v_index[None, :], listed[:, None] & inside[None, :], 0.0
                    )
                    rest += tl.sum(other_share[:, None] * rows, axis=0)
                total += tl.where((g == one)[:, None], rest[None, :], 0.0)
    return total


@triton.jit
def step_rows(
    tile, table, table_step, versions, before, after, slots, error, move, order, count_of, group_of,
    n_accesses, n_rows, n_chunk, n_tokens, start,
    N_READ: tl.constexpr, VALUE: tl.constexpr, VERSIONS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """row_u += sum over the chunk's accesses (t,j) -> u of move_tj error_t, of BLOCK_G accesses the groups they start.

    Without VERSIONS in place, in the table. With VERSIONS the new row goes to its group's row of ``versions``, and only
    if a later chunk reads it.

    Bytes per row: V read, V written, and those of :func:`sum_groups`.
    """
    index = tile * BLOCK_G + tl.arange(0, BLOCK_G)
    exists = index < n_accesses
    access, memory = chunk_access(index, n_rows, n_chunk, n_tokens, start, N_READ)
    # Asked for together: one wait.
    count = tl.load(count_of + access, exists, 0)
    group = tl.load(group_of + access, exists, 0)
    row = memory * table_step + tl.load(slots + access, exists, 0)
    if VERSIONS:
        version = tl.load(before + access, exists, -1)
        count = tl.where(tl.load(after + access, exists, -1) >= 0, count, 0)
        old_place = newest_rows(table, row, versions, version, VALUE, ALIGN)
        new_place = versions + group.to(tl.int64) * VALUE
    else:
        old_place = table + row * VALUE
        new_place = old_place
    if tl.max(count, axis=0) > 0:
        for first in range(0, VALUE, BLOCK_V):
            v_index = first + tl.arange(0, BLOCK_V)
            inside = (count > 0)[:, None] & (v_index < VALUE)[None, :]
            old = tl.load(old_place[:, None] + v_index[None, :], inside, 0.0)
            step = sum_groups(
                access, count, group, v_index, error, move, order, n_chunk, n_tokens, start,
                N_READ, VALUE, VERSIONS, BLOCK_G, BLOCK_E, BLOCK_V,
            )  # fmt: skip
            tl.store(new_place[:, None] + v_index[None, :], old + step, inside)


@triton.jit
def step_rows_backward(
    tile, later, d_table, before, after, slots, d_read, weights, order, count_of, group_of,
    n_accesses, n_table, n_rows, n_chunk, n_tokens, start,
    N_READ: tl.constexpr, VALUE: tl.constexpr, GIVEN: tl.constexpr, FIRST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The derivative of the rows that a chunk read from those that it left: M_u + sum over (t,j) -> u of w_tj dread_t.

    M_u, of the row after the chunk, is row ``after`` of ``later`` (E,V); of a row that no later chunk reads it is that
    of the call's last table, row u of ``d_table`` (M*N,V) if GIVEN, else 0. The sum goes to row ``before`` of
    ``later``; of a row that no chunk read before, to row u of ``d_table`` if FIRST, else nowhere.
    """
    index = tile * BLOCK_G + tl.arange(0, BLOCK_G)
    exists = index < n_accesses
    access, memory = chunk_access(index, n_rows, n_chunk, n_tokens, start, N_READ)
    count = tl.load(count_of + access, exists, 0)
    group = tl.load(group_of + access, exists, 0)
    earlier = tl.load(before + access, exists, -1)
    version = tl.load(after + access, exists, -1)
    row = memory * n_table + tl.load(slots + access, exists, 0)
    is_known = version >= 0
    old_place = later + version.to(tl.int64) * VALUE
    new_place = later + earlier.to(tl.int64) * VALUE
    if GIVEN:
        old_place = newest_rows(d_table, row, later, version, VALUE, ALIGN)
        is_known = exists
    if FIRST:
        new_place = newest_rows(d_table, row, later, earlier, VALUE, ALIGN)
    else:
        count = tl.where(earlier >= 0, count, 0)
    if tl.max(count, axis=0) > 0:
        for first in range(0, VALUE, BLOCK_V):
            v_index = first + tl.arange(0, BLOCK_V)
            inside = (count > 0)[:, None] & (v_index < VALUE)[None, :]
            old = tl.load(old_place[:, None] + v_index[None, :], inside & is_known[:, None], 0.0)
            step = sum_groups(
                access, count, group, v_index, d_read, weights, order, n_chunk, n_tokens, start,
                N_READ, VALUE, False, BLOCK_G, BLOCK_E, BLOCK_V,
            )  # fmt: skip
            tl.store(new_place[:, None] + v_index[None, :], old + step, inside)


@triton.jit(do_not_specialize=["n_table", "table_step", "n_all", "n_tokens"])
def last_rows_kernel(
    last,  # (M*N,) int32
    table,  # (1 or M,N,V)
    versions,  # (E,V)
    before,
    count_of,
    group_of,  # (E,) each
    order,
    move,
    error,  # (M,R,T,V)
    out,  # out (M*N,V)
    n_table,
    table_step,
    n_all,
    n_tokens,
    N_READ: tl.constexpr,
    VALUE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    target = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    exists = target < n_all
    access = tl.load(last + target, exists, -1).to(tl.int64)
    is_read = access >= 0
    count = tl.load(count_of + access, is_read, 0)
    group = tl.load(group_of + access, is_read, 0)
    version = tl.load(before + access, is_read, -1)
    row = target % n_table + target // n_table * table_step
    place = newest_rows(table, row, versions, version, VALUE, ALIGN)
    for first in range(0, VALUE, BLOCK_V):
        v_index = first + tl.arange(0, BLOCK_V)
        inside = exists[:, None] & (v_index < VALUE)[None, :]
        new = tl.load(place[:, None] + v_index[None, :], inside, 0.0)
        new += sum_groups(
            access, count, group, v_index, error, move, order, n_tokens, n_tokens, 0,
            N_READ, VALUE, True, BLOCK_G, BLOCK_E, BLOCK_V,
        )  # fmt: skip
        tl.store(out + target[:, None] * VALUE + v_index[None, :], new, inside)


@triton.jit(do_not_specialize=["n_accesses", "n_table", "n_memory_accesses"])
def last_accesses_kernel(
    slots,  # (E,) int64
    after,
    count,
    last,  # in and out (M*N,) int32
    n_accesses,
    n_table,
    n_memory_accesses,
    BLOCK: tl.constexpr,
):
    access = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = access < n_accesses
    slot = tl.load(slots + access, exists, 0)
    is_last = exists & (tl.load(count + access, exists, 0) > 0) & (tl.load(after + access, exists, 0) < 0)
    row = (access // n_memory_accesses).to(tl.int64) * n_table + slot
    tl.store(last + row, access, is_last)


def last_rows(table: Tensor, slots: Tensor, versions: Tensor, error: Tensor, accesses: Accesses, out: Tensor) -> None:
    """out (M,N,V): the table after a call, from the given one (1 or M,N,V), the versions (E,V) that its chunks read,
    and the step of each row's last group, which :func:`mixers.kernels.value_chain.value_chain` leaves out.

    error (M,R,T,V). Bytes: V in and V out for every row, V of errors for every access of a last group.
    """
    n_memories, n_slots, value_dim = out.shape
    n_read, n_tokens = slots.shape[-1], slots.shape[2]
    last = slots.new_full((n_memories * n_slots,), -1, dtype=accesses.count.dtype)
    block = 256
    launch(
        last_accesses_kernel,
        (triton.cdiv(slots.numel(), block),),
        *(slots, accesses.after, accesses.count, last, slots.numel(), n_slots, slots.numel() // n_memories),
        BLOCK=block,
        num_warps=4,
    )
    block_g, block_e, block_v = step_tile_sizes(value_dim)
    launch(
        last_rows_kernel,
        (triton.cdiv(n_memories * n_slots, block_g),),
        *(last, table, versions, accesses.before, accesses.count, accesses.group, accesses.order, accesses.move),
        *(error, out, n_slots, table_step(table), n_memories * n_slots, n_tokens),
        N_READ=n_read,
        VALUE=value_dim,
        ALIGN=row_alignment(table, versions),
        BLOCK_G=block_g,
        BLOCK_E=block_e,
        BLOCK_V=block_v,
        num_warps=4,
    )


def table_step(table: Tensor) -> int:
    """Rows from one memory's to the next in a table (1 or M,N,V): 0 where all start from the same."""
    return 0 if table.shape[0] == 1 else table.shape[1]


def step_tile_sizes(value_dim: int) -> tuple[int, int, int]:
    """Accesses that a program of four warps steps together, further accesses of a row at a time, elements of a row."""
    block_v = min(512, triton.next_power_of_2(value_dim))
    return max(1, min(8, 4096 // block_v)), 2, block_v
