"""All reads and writes of a call: its chunks one after the other in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.barrier import begin, meet, meetings, n_programs
from mixers.kernels.groups import Groups
from mixers.kernels.launch import launch
from mixers.kernels.read import read_token, rows_at_once
from mixers.kernels.update import step_positions, update_tile_sizes

# Programs of four warps on a multiprocessor, and registers a thread that leave room for them.
PROGRAMS, REGISTERS = 4, 128


@triton.jit(do_not_specialize=["n_table", "n_memories", "n_rows", "n_tokens", "chunk_size", "n_chunks", "lookahead"])
def value_chain_kernel(
    table,  # in and out (M*N,V)
    slots,  # (M,R,T,J) int64
    weights,  # (M,R,T,J)
    v,  # (M,R,T,V)
    pair_weight,  # (M,R,T)
    scale,  # (n_chunks,M)
    order,
    row,
    first_of,
    count_of,  # (E,) each
    read,  # out (M,R,T,V)
    squared_error,  # out (M,R,T)
    overwritten,  # out (E,V), KEEP only
    error,  # scratch (M,S,V)
    arrived,  # of :func:`meetings`
    n_table,
    n_memories,
    n_rows,
    n_tokens,
    chunk_size,
    n_chunks,
    lookahead,
    N_READ: tl.constexpr,
    VALUE: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_J: tl.constexpr,
    READ_V: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STEP_V: tl.constexpr,
    TIMED: tl.constexpr,
):
    program = tl.program_id(0)
    n_together = tl.num_programs(0)
    n_meetings = 0
    begin(arrived, TIMED)
    for chunk in range(n_chunks):
        start = chunk * chunk_size
        n_chunk = tl.minimum(chunk_size, n_tokens - start)
        n_queries = n_rows * n_chunk
        for query in range(program, n_memories * n_queries, n_together):
            read_token(
                query % n_queries, query // n_queries, table, slots, weights, v, pair_weight, read, error,
                squared_error, n_table, n_rows, n_chunk, n_tokens, start, lookahead,
                N_READ, VALUE, True, BLOCK_J, READ_V,
            )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, TIMED)

        first = start.to(tl.int64) * n_memories * n_rows * N_READ
        n_positions = n_memories * n_queries * N_READ
        for tile in range(program, tl.cdiv(n_positions, BLOCK_G), n_together):
            step_positions(
                first + tile * BLOCK_G + tl.arange(0, BLOCK_G), first + n_positions, table, error, weights,
                scale + chunk * n_memories, order, row, first_of, count_of, overwritten, table, n_chunk, n_tokens,
                start, n_table, N_READ, VALUE, True, KEEP, False, BLOCK_G, BLOCK_E, STEP_V,
            )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, TIMED)


def value_chain(
    table: Tensor,
    slots: Tensor,
    weights: Tensor,
    v: Tensor,
    pair_weight: Tensor,
    scale: Tensor,
    groups: Groups,
    read: Tensor,
    squared_error: Tensor,
    overwritten: Tensor | None,
    chunk_size: int,
    lookahead: int,
) -> None:
    """Read v's predictions from ``table`` (M,N,V) and step the rows that were read, chunk by chunk, in place.

    slots, weights (M,R,T,J), v and ``read`` (M,R,T,V), pair_weight and squared_error (M,R,T), scale (n_chunks,M).
    ``overwritten`` (E,V): where given, row p receives the old row of the group that starts at position p of ``groups``;
    other rows of it are not written.

    A chunk is two steps that wait for one another, :func:`read_token` for all of its tokens and :func:`step_positions`
    for all of its groups; the programs of the one launch meet between them.
    """
    n_memories, n_rows, n_tokens, n_read = slots.shape
    value_dim = table.shape[-1]
    block_v = triton.next_power_of_2(value_dim)
    block_g, block_e, step_v = update_tile_sizes(value_dim)
    error = v.new_empty(n_memories * n_rows * min(chunk_size, n_tokens), value_dim)
    n_chunks = triton.cdiv(n_tokens, chunk_size)
    arrived, timed = meetings(v, "value_chain", n_chunks, ("read", "step"))
    launch(
        value_chain_kernel,
        (n_programs(v, PROGRAMS),),
        *(table, slots, weights, v, pair_weight, scale, *groups, read, squared_error),
        *(table if overwritten is None else overwritten, error, arrived, table.shape[1]),
        *(n_memories, n_rows, n_tokens, chunk_size, n_chunks, lookahead),
        N_READ=n_read,
        VALUE=value_dim,
        KEEP=overwritten is not None,
        BLOCK_J=rows_at_once(n_read, block_v),
        READ_V=block_v,
        BLOCK_G=block_g,
        BLOCK_E=block_e,
        STEP_V=step_v,
        TIMED=timed,
        num_warps=4,
        cooperative=True,
        max_registers=REGISTERS,
    )
