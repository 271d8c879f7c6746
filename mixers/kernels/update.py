"""One step of every row that a chunk touched: each row's accesses are summed in order by one program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scratch_row(access, n_chunk, n_tokens, start, N_READ: tl.constexpr):
    """Row of the chunk's (M,S,V) scratch that an access reads; there are fewer than 2^31 accesses."""
    token = access.to(tl.int32) // N_READ
    return (token // n_tokens * n_chunk + (token % n_tokens - start)).to(tl.int64)


@triton.jit
def step_positions(
    position, end, table, source, weights, scale, order, row, first_of, count_of, overwritten, touched,
    n_chunk, n_tokens, start, n_table,
    N_READ: tl.constexpr, VALUE: tl.constexpr, MEAN: tl.constexpr, KEEP: tl.constexpr, TOUCH: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """table_u += sum over the chunk's accesses (t,j) -> u of w_tj source_t for the groups that start at ``position``.

    position (BLOCK_G,) int64, below ``end``: most positions start a group, of one access. With MEAN the sum is
    multiplied by scale_m / cnt_u; with KEEP the old row goes to row ``position`` of ``overwritten``. With TOUCH a row
    counts as 0 until ``touched`` (M*N,) says that it was written, which is said then.

    Bytes per access: V of source (from the L2 cache), and per touched row V read, V written, with KEEP V kept. A row's
    accesses are summed by one program, BLOCK_E at a time: a slot read by all tokens of a chunk takes S / BLOCK_E steps.
    """
    exists = position < end
    # Asked for together, before it is known which positions start a group: one wait instead of three.
    starts = exists & (tl.load(first_of + position, exists, -1) == position)
    count = tl.load(count_of + position, exists, 0)
    target = tl.load(row + position, exists, 0)
    access = tl.load(order + position, exists, 0)
    weight = tl.load(weights + access, exists, 0.0)
    if MEAN:
        rate = tl.load(scale + target // n_table, exists, 0.0) / tl.maximum(count, 1).to(weight.dtype)
    n_most = tl.max(tl.where(starts, count, 0), axis=0)
    written = starts
    if TOUCH:
        written = starts & (tl.load(touched + target, starts, 0) != 0)
    for first in range(0, VALUE, BLOCK_V):
        v_index = first + tl.arange(0, BLOCK_V)
        inside = starts[:, None] & (v_index < VALUE)[None, :]
        old = tl.load(table + target[:, None] * VALUE + v_index[None, :], inside & written[:, None], 0.0)
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
        if MEAN:
            step = step * rate[:, None]
        if KEEP:
            tl.store(overwritten + position[:, None] * VALUE + v_index[None, :], old, inside)
        tl.store(table + target[:, None] * VALUE + v_index[None, :], old + step, inside)
    if TOUCH:
        # All threads have loaded before one stores.
        tl.debug_barrier()
        tl.store(touched + target, tl.full(target.shape, 1, dtype=tl.int8), starts)


def update_tile_sizes(value_dim: int) -> tuple[int, int, int]:
    """Positions that a program of four warps steps together, accesses of each at a time, elements of a row."""
    block_v = min(512, triton.next_power_of_2(value_dim))
    return max(1, min(8, 2048 // block_v)), 2, block_v
