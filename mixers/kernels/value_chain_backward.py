"""Backward of :mod:`mixers.kernels.value_chain`: the chunks from the last to the first in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.barrier import begin, meet, meetings, n_programs
from mixers.kernels.launch import launch
from mixers.kernels.read import row_alignment, rows_at_once
from mixers.kernels.read_backward import token_backward
from mixers.kernels.row_steps import step_rows_backward, step_tile_sizes, table_step
from mixers.kernels.value_chain import PROGRAMS, REGISTERS
from mixers.kernels.versions import Accesses


@triton.jit(
    do_not_specialize=[
        "n_table", "table_step", "n_memories", "n_rows", "n_tokens", "chunk_size", "n_chunks", "lookahead",
    ]
)  # fmt: skip
def value_chain_backward_kernel(
    later,  # in and out (E,V)
    d_table,  # in and out (M*N,V), GIVEN or FIRST only
    table,  # (1 or M,N,V)
    versions,  # (E,V)
    slots,  # (M,R,T,J) int64
    weights,  # (M,R,T,J)
    pairs,  # (M,R,T,J) int32
    order,
    group,
    count,
    before,
    after,
    factors,  # (E,) each
    read,  # (M,R,T,V)
    v,  # (M,R,T,V)
    gate,  # (M,R,T), GATED only
    mask,  # (M,R,T), MASKED only
    d_out,  # (M,R,T,V)
    d_weights,  # (M,R,T,J), ADD_WEIGHTS only
    temperature,
    d_v,  # out (M,R,T,V)
    d_gate,  # out (M,R,T), GATED only
    d_half,  # out (M,R,T,H,2,k)
    d_read,  # scratch (M,S,V)
    arrived,  # of :func:`meetings`
    n_table,
    table_step,
    n_memories,
    n_rows,
    n_tokens,
    chunk_size,
    n_chunks,
    lookahead,
    HEADS: tl.constexpr,
    TOP_K: tl.constexpr,
    VALUE: tl.constexpr,
    GATED: tl.constexpr,
    MASKED: tl.constexpr,
    ADD_WEIGHTS: tl.constexpr,
    GIVEN: tl.constexpr,
    FIRST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_J: tl.constexpr,
    READ_V: tl.constexpr,
    ALL_J: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STEP_V: tl.constexpr,
    TIMED: tl.constexpr,
):
    program = tl.program_id(0)
    n_together = tl.num_programs(0)
    n_meetings = 0
    begin(arrived, program, TIMED)
    for n_done in range(n_chunks):
        chunk = n_chunks - 1 - n_done
        start = chunk * chunk_size
        n_chunk = tl.minimum(chunk_size, n_tokens - start)
        n_queries = n_rows * n_chunk
        for query in range(program, n_memories * n_queries, n_together):
            token_backward(
                query % n_queries, query // n_queries, later, d_table, table, table_step, versions, before, after,
                slots, factors, weights, pairs, read, v, gate, mask, d_out, d_weights, temperature, d_read, d_v, d_gate,
                d_half, n_table, n_rows, n_chunk, n_tokens, start, lookahead,
                HEADS, TOP_K, VALUE, GATED, MASKED, ADD_WEIGHTS, GIVEN, ALIGN, BLOCK_J, READ_V, ALL_J,
            )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, program, n_together, TIMED)

        # No chunk reads a row before the first.
        n_steps = n_chunks if FIRST else n_chunks - 1
        if n_done < n_steps:
            n_accesses = n_memories * n_queries * (HEADS * TOP_K)
            for tile in range(program, tl.cdiv(n_accesses, BLOCK_G), n_together):
                step_rows_backward(
                    tile, later, d_table, before, after, slots, d_read, weights, order, count, group,
                    n_accesses, n_table, n_rows, n_chunk, n_tokens, start,
                    HEADS * TOP_K, VALUE, GIVEN, FIRST, ALIGN, BLOCK_G, BLOCK_E, STEP_V,
                )  # fmt: skip
            n_meetings += 1
            meet(arrived, n_meetings, program, n_together, TIMED)


def value_chain_backward(
    later: Tensor,
    d_table: Tensor | None,
    table: Tensor,
    versions: Tensor,
    slots: Tensor,
    weights: Tensor,
    pairs: Tensor,
    accesses: Accesses,
    read: Tensor,
    v: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    d_out: Tensor,
    d_weights: Tensor | None,
    temperature: float,
    d_v: Tensor,
    d_gate: Tensor | None,
    d_half: Tensor,
    chunk_size: int,
    lookahead: int,
    *,
    given: bool,
    needs_table: bool,
) -> None:
    """Derivatives of all tokens' reads and errors, those of the rows carried back from chunk to chunk.

    ``later`` (E,V) takes the derivatives of ``versions`` (E,V) and may be the same memory: each is read for the last
    time in the chunk whose step writes its derivative. ``d_table`` (M,N,V): if ``given``, at first the derivative of
    the last table; if ``needs_table``, at the end that of the first, and at first that of the last or 0.

    See :func:`token_backward` for the others; the table's step is the transpose of the read,
    :func:`step_rows_backward`. The programs of the one launch meet between the two.
    """
    n_memories, n_rows, n_tokens, n_read = slots.shape
    n_heads, top_k, value_dim = d_half.shape[3], d_half.shape[5], v.shape[-1]
    block_v = triton.next_power_of_2(value_dim)
    block_g, block_e, step_v = step_tile_sizes(value_dim)
    d_read = v.new_empty(n_memories * n_rows * min(chunk_size, n_tokens), value_dim)
    n_chunks = triton.cdiv(n_tokens, chunk_size)
    arrived, timed = meetings(v, "value_chain_backward", n_chunks, ("token", "step"))
    launch(
        value_chain_backward_kernel,
        (n_programs(v, PROGRAMS),),
        *(later, later if d_table is None else d_table, table, versions, slots, weights, pairs),
        *(accesses.order, accesses.group, accesses.count, accesses.before, accesses.after, accesses.factor),
        *(read, v, v if gate is None else gate, v if mask is None else mask, d_out),
        *(weights if d_weights is None else d_weights, float(temperature)),
        *(d_v, d_v if d_gate is None else d_gate, d_half, d_read),
        *(arrived, table.shape[1], table_step(table), n_memories, n_rows, n_tokens, chunk_size),
        *(n_chunks, lookahead),
        HEADS=n_heads,
        TOP_K=top_k,
        VALUE=value_dim,
        GATED=gate is not None,
        MASKED=mask is not None,
        ADD_WEIGHTS=d_weights is not None,
        GIVEN=given,
        FIRST=needs_table,
        ALIGN=row_alignment(table, versions, later, *(() if d_table is None else (d_table,))),
        BLOCK_J=rows_at_once(n_read, block_v),
        READ_V=block_v,
        ALL_J=triton.next_power_of_2(n_read),
        BLOCK_G=block_g,
        BLOCK_E=block_e,
        STEP_V=step_v,
        TIMED=timed,
        num_warps=4,
        cooperative=True,
        max_registers=REGISTERS,
    )
