"""One step of every row that a chunk touched: each row's accesses are summed in order by one program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.chunk import Chunk
from mixers.kernels.groups import Groups
from mixers.kernels.launch import launch


@triton.jit
def scratch_row(access, n_chunk, n_tokens, start, N_READ: tl.constexpr):
    """Row of the chunk's (M,S,V) scratch that an access reads; there are fewer than 2^31 accesses."""
    token = access.to(tl.int32) // N_READ
    return (token // n_tokens * n_chunk + (token % n_tokens - start)).to(tl.int64)


@triton.jit
def add_groups(
    position, end, table, source, weights, order, row, first_of, count_of, n_chunk, n_tokens, start,
    N_READ: tl.constexpr, VALUE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """table_u += sum over the chunk's accesses (t,j) -> u of w_tj source_t for the groups that start at ``position``.

    position (BLOCK_G,) int64, below ``end``: most positions start a group, of one access.

    Bytes per access: V of source (from the L2 cache), and per touched row V read, V written. A row's accesses are summed
    by one program, BLOCK_E at a time: a slot read by all tokens of a chunk takes S / BLOCK_E steps.
    """
    exists = position < end
    # Asked for together, before it is known which positions start a group: one wait instead of three.
    starts = exists & (tl.load(first_of + position, exists, -1) == position)
    count = tl.load(count_of + position, exists, 0)
    target = tl.load(row + position, exists, 0)
    access = tl.load(order + position, exists, 0)
    weight = tl.load(weights + access, exists, 0.0)
    n_most = tl.max(tl.where(starts, count, 0), axis=0)
    for first in range(0, VALUE, BLOCK_V):
        v_index = first + tl.arange(0, BLOCK_V)
        inside = starts[:, None] & (v_index < VALUE)[None, :]
        old = tl.load(table + target[:, None] * VALUE + v_index[None, :], inside, 0.0)
        scratch = scratch_row(access, n_chunk, n_tokens, start, N_READ)
        step = weight[:, None] * tl.load(source + scratch[:, None] * VALUE + v_index[None, :], inside, 0.0)
        if n_most > 1:
            # The rest of each group, BLOCK_E accesses of each at a time, one row of the tile for each.
            flat = tl.arange(0, BLOCK_G * BLOCK_E)
            of_group = flat // BLOCK_E
            flat_position = tl.min(position, axis=0) + of_group
            flat_exists = flat_position < end
            begins = flat_exists & (tl.load(first_of + flat_position, flat_exists, -1) == flat_position)
            n_listed = tl.where(begins, tl.load(count_of + flat_position, flat_exists, 0), 0)
            done = 1
            while done < n_most:
                e = done + flat % BLOCK_E
                listed = e < n_listed
                accesses = tl.load(order + flat_position + e, listed, 0)
                more = tl.load(weights + accesses, listed, 0.0)
                scratches = scratch_row(accesses, n_chunk, n_tokens, start, N_READ)
                rows = tl.load(
                    source + scratches[:, None] * VALUE + v_index[None, :],
                    listed[:, None] & (v_index < VALUE)[None, :],
                    0.0,
                )
                step += tl.sum(tl.reshape(more[:, None] * rows, (BLOCK_G, BLOCK_E, BLOCK_V)), axis=1)
                done += BLOCK_E
        tl.store(table + target[:, None] * VALUE + v_index[None, :], old + step, inside)


@triton.jit(do_not_specialize=["first_position", "end_position", "n_chunk", "n_tokens", "start", "n_table"])
def update_kernel(
    table,  # in and out (M*N,V)
    source,  # (M,S,V)
    weights,  # (E,)
    order,
    row,
    first_of,
    count_of,  # (E,) each
    first_position,
    end_position,
    n_chunk,
    n_tokens,
    start,
    n_table,
    N_READ: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    position = first_position + tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    add_groups(
        position, end_position, table, source, weights, order, row, first_of, count_of, n_chunk, n_tokens, start,
        N_READ, VALUE, BLOCK_G, BLOCK_E, BLOCK_V,
    )  # fmt: skip


def add_rows(table: Tensor, source: Tensor, weights: Tensor, groups: Groups, chunk: Chunk) -> None:
    """table_u += sum over the chunk's accesses (t,j) -> u of w_tj source_t, in place: the transpose of the read.

    table (M,N,V), source (M,S,V), weights (M,R,T,J).
    """
    value_dim, n_read = table.shape[-1], weights.shape[-1]
    n_sequences = chunk.n_memories * chunk.n_rows
    first = chunk.start * n_sequences * n_read
    n_positions = n_sequences * chunk.n_chunk * n_read
    block_v = min(512, triton.next_power_of_2(value_dim))
    block_g = 1
    launch(
        update_kernel,
        (triton.cdiv(n_positions, block_g),),
        *(table, source, weights, *groups, first, first + n_positions),
        *(chunk.n_chunk, chunk.n_tokens, chunk.start, table.shape[1]),
        N_READ=n_read,
        VALUE=value_dim,
        BLOCK_G=block_g,
        BLOCK_E=4,
        BLOCK_V=block_v,
        num_warps=4 if block_v >= 512 else 2 if block_v >= 256 else 1,
    )

