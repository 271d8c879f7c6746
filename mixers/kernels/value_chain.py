"""All reads and writes of a call: its chunks one after the other in one launch."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.barrier import begin, meet, meetings, n_programs
from mixers.kernels.launch import launch
from mixers.kernels.read import read_token, row_alignment, rows_at_once
from mixers.kernels.row_steps import step_rows, step_tile_sizes, table_step
from mixers.kernels.versions import Accesses

# Programs of four warps on a multiprocessor, and registers a thread that leave room for them.
PROGRAMS, REGISTERS = 4, 128


# Integers of the kernel that no variant of its own is compiled for.
VALUE_SIZES = ["table_step", "n_memories", "n_rows", "n_tokens", "chunk_size", "n_chunks", "lookahead"]


class ValueWork(NamedTuple):
    """What :func:`value_chain` reads and steps, and where to.

    table (1 or M,N,V); versions (E,V), or None to step the table in place; slots int64 and weights (M,R,T,J); v and
    read (M,R,T,V); gate, mask and squared_error (M,R,T); error (M,R,T,V), None with a table in place.
    """

    table: Tensor
    versions: Tensor | None
    slots: Tensor
    weights: Tensor
    v: Tensor
    gate: Tensor | None
    mask: Tensor | None
    accesses: Accesses
    read: Tensor
    squared_error: Tensor
    error: Tensor | None
    chunk_size: int
    lookahead: int


@triton.jit
def read_and_step_chunks(
    program, n_together,
    table, versions, slots, weights, v, gate, mask, order, group, count, before, after, move, read, squared_error,
    error, arrived, table_step, n_memories, n_rows, n_tokens, chunk_size, n_chunks, lookahead,
    N_READ: tl.constexpr, VALUE: tl.constexpr, VERSIONS: tl.constexpr, GATED: tl.constexpr, MASKED: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_J: tl.constexpr, READ_V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
    STEP_V: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    """All chunks of :func:`value_chain_kernel`, whose arguments these are, by ``program`` of ``n_together``."""
    n_meetings = 0
    begin(arrived, program, TIMED)
    for chunk in range(n_chunks):
        start = chunk * chunk_size
        n_chunk = tl.minimum(chunk_size, n_tokens - start)
        n_queries = n_rows * n_chunk
        for query in range(program, n_memories * n_queries, n_together):
            read_token(
                query % n_queries, query // n_queries, table, table_step, versions, before, slots, weights, v, gate,
                mask, read, error, squared_error, n_rows, n_chunk, n_tokens, start, lookahead,
                N_READ, VALUE, VERSIONS, GATED, MASKED, ALIGN, BLOCK_J, READ_V,
            )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, program, n_together, TIMED)

        # No later chunk reads what the last one writes.
        n_steps = n_chunks - 1 if VERSIONS else n_chunks
        if chunk < n_steps:
            n_accesses = n_memories * n_queries * N_READ
            n_tiles = tl.cdiv(n_accesses, BLOCK_G)
            # Backwards: what was read last is still in the L2 cache.
            for tile in range(program, n_tiles, n_together):
                step_rows(
                    n_tiles - 1 - tile, table, table_step, versions, before, after, slots, error, move, order, count,
                    group, n_accesses, n_rows, n_chunk, n_tokens, start,
                    N_READ, VALUE, VERSIONS, ALIGN, BLOCK_G, BLOCK_E, STEP_V,
                )  # fmt: skip
            n_meetings += 1
            meet(arrived, n_meetings, program, n_together, TIMED)


@triton.jit(do_not_specialize=VALUE_SIZES)
def value_chain_kernel(
    table,  # (1 or M,N,V); without VERSIONS in and out (M,N,V)
    versions,  # out (E,V), VERSIONS only
    slots,  # (M,R,T,J) int64
    weights,  # (M,R,T,J)
    v,  # (M,R,T,V)
    gate,  # (M,R,T), GATED only
    mask,  # (M,R,T), MASKED only
    order,
    group,
    count,
    before,
    after,
    move,  # (E,) each
    read,  # out (M,R,T,V)
    squared_error,  # out (M,R,T)
    error,  # out (M,R,T,V); without VERSIONS scratch (M,S,V)
    arrived,  # of :func:`meetings`
    table_step,
    n_memories,
    n_rows,
    n_tokens,
    chunk_size,
    n_chunks,
    lookahead,
    N_READ: tl.constexpr,
    VALUE: tl.constexpr,
    VERSIONS: tl.constexpr,
    GATED: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_J: tl.constexpr,
    READ_V: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STEP_V: tl.constexpr,
    TIMED: tl.constexpr,
):
    read_and_step_chunks(
        tl.program_id(0), tl.num_programs(0),
        table, versions, slots, weights, v, gate, mask, order, group, count, before, after, move, read, squared_error,
        error, arrived, table_step, n_memories, n_rows, n_tokens, chunk_size, n_chunks, lookahead, N_READ, VALUE,
        VERSIONS, GATED, MASKED, ALIGN, BLOCK_J, READ_V, BLOCK_G, BLOCK_E, STEP_V, TIMED,
    )  # fmt: skip


def value_chain(work: ValueWork) -> None:
    """Read v's predictions from the rows of ``table`` and step the rows that were read, chunk by chunk.

    slots, weights (M,R,T,J), v and ``read`` (M,R,T,V), gate, mask and squared_error (M,R,T). With ``versions`` (E,V)
    the table (1 or M,N,V) stays as it is: a group's new row goes to its row of ``versions``, and only where a later
    chunk reads it; ``error`` (M,R,T,V) receives all tokens' errors. Without, table (M,N,V) is stepped in place.

    A chunk is two steps that wait for one another, :func:`read_token` for all of its tokens and :func:`step_rows` for
    all of its groups; the programs of the one launch meet between them.
    """
    arguments, constants = value_arguments(work)
    launch(
        value_chain_kernel,
        (n_programs(work.v, PROGRAMS),),
        *arguments,
        **constants,
        num_warps=4,
        cooperative=True,
        max_registers=REGISTERS,
    )


def value_arguments(work: ValueWork) -> tuple[tuple, dict[str, object]]:
    """What :func:`value_chain` launches its kernel with."""
    table, versions, slots, weights, v, gate, mask, accesses, read, squared_error, error, chunk_size, lookahead = work
    n_memories, n_rows, n_tokens, n_read = slots.shape
    value_dim = table.shape[-1]
    block_v = triton.next_power_of_2(value_dim)
    block_g, block_e, step_v = step_tile_sizes(value_dim)
    n_chunks = triton.cdiv(n_tokens, chunk_size)
    if error is None:
        error = v.new_empty(n_memories * n_rows * min(chunk_size, n_tokens), value_dim)
    arrived, timed = meetings(v, "value_chain", n_chunks, ("read", "step"))
    arguments = (
        *(table, table if versions is None else versions, slots, weights, v),
        *(v if gate is None else gate, v if mask is None else mask),
        *(accesses.order, accesses.group, accesses.count, accesses.before, accesses.after, accesses.move),
        *(read, squared_error, error, arrived, table_step(table)),
        *(n_memories, n_rows, n_tokens, chunk_size, n_chunks, lookahead),
    )
    constants = {
        "N_READ": n_read,
        "VALUE": value_dim,
        "VERSIONS": versions is not None,
        "GATED": gate is not None,
        "MASKED": mask is not None,
        "ALIGN": row_alignment(table, table if versions is None else versions),
        "BLOCK_J": rows_at_once(n_read, block_v),
        "READ_V": block_v,
        "BLOCK_G": block_g,
        "BLOCK_E": block_e,
        "STEP_V": step_v,
        "TIMED": timed,
    }
    return arguments, constants
