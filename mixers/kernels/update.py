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


@triton.jit(do_not_specialize=["first_position", "n_chunk", "n_tokens", "start", "n_table"])
def update_kernel(
    table,  # in and out (M*N,V)
    source,  # (M,S,V)
    weights,  # (E,)
    scale,  # (M,), MEAN only
    order,
    row,
    first_of,
    count_of,  # (E,) each
    overwritten,  # out (E,V), KEEP only
    first_position,
    n_chunk,
    n_tokens,
    start,
    n_table,
    N_READ: tl.constexpr,
    VALUE: tl.constexpr,
    MEAN: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    position = first_position + tl.program_id(0).to(tl.int64)
    # Asked for together, before it is known whether this program has a row: one wait instead of three.
    first = tl.load(first_of + position)
    count = tl.load(count_of + position)
    target = tl.load(row + position)
    access = tl.load(order + position)
    if first == position:
        v_index = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = v_index < VALUE
        old = tl.load(table + target * VALUE + v_index, inside, 0.0)
        # Most rows are touched once.
        weight = tl.load(weights + access)
        scratch = scratch_row(access, n_chunk, n_tokens, start, N_READ)
        step = weight * tl.load(source + scratch * VALUE + v_index, inside, 0.0)
        done = 1
        while done < count:
            e = done + tl.arange(0, BLOCK_E)
            accesses = tl.load(order + position + e, e < count, 0)
            more = tl.load(weights + accesses, e < count, 0.0)
            scratches = scratch_row(accesses, n_chunk, n_tokens, start, N_READ)
            rows = tl.load(
                source + scratches[:, None] * VALUE + v_index[None, :], (e < count)[:, None] & inside[None, :], 0.0
            )
            step += tl.sum(more[:, None] * rows, axis=0)
            done += BLOCK_E
        if MEAN:
            step = step * (tl.load(scale + target // n_table) / count.to(step.dtype))
        if KEEP:
            tl.store(overwritten + position * VALUE + v_index, old, inside)
        tl.store(table + target * VALUE + v_index, old + step, inside)


def step_rows(
    table: Tensor,
    error: Tensor,
    weights: Tensor,
    scale: Tensor,
    groups: Groups,
    overwritten: Tensor | None,
    chunk: Chunk,
) -> None:
    """table_u += scale_m / cnt_u * sum over the chunk's accesses (t,j) -> u of w_tj error_t, in place.

    table (M,N,V), error (M,S,V), weights (M,R,T,J), scale (M,). ``overwritten`` (E,V): where given, row p receives
    the old row of the group that starts at position p; other rows of it are not written.

    Bytes per access: V of error (from the L2 cache), and per touched row V read, V written, V kept. A row's accesses
    are summed by one program, BLOCK_E at a time: a slot read by all tokens of a chunk takes S / BLOCK_E steps in a row.
    """
    _launch(table, error, weights, scale, groups, overwritten, chunk, mean=True)


def add_rows(table: Tensor, source: Tensor, weights: Tensor, groups: Groups, chunk: Chunk) -> None:
    """table_u += sum over the chunk's accesses (t,j) -> u of w_tj source_t, in place: the transpose of the read."""
    _launch(table, source, weights, weights, groups, None, chunk, mean=False)


def _launch(table, source, weights, scale, groups, overwritten, chunk, *, mean) -> None:
    value_dim, n_read = table.shape[-1], weights.shape[-1]
    n_sequences = chunk.n_memories * chunk.n_rows
    block_v = min(512, triton.next_power_of_2(value_dim))
    grid = (n_sequences * chunk.n_chunk * n_read, triton.cdiv(value_dim, block_v))
    launch(
        update_kernel,
        grid,
        table,
        source,
        weights,
        scale,
        *groups,
        table if overwritten is None else overwritten,
        chunk.start * n_sequences * n_read,
        chunk.n_chunk,
        chunk.n_tokens,
        chunk.start,
        table.shape[1],
        N_READ=n_read,
        VALUE=value_dim,
        MEAN=mean,
        KEEP=overwritten is not None,
        BLOCK_E=4,
        BLOCK_V=block_v,
        num_warps=4 if block_v >= 512 else 2 if block_v >= 256 else 1,
    )
