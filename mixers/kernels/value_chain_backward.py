"""Backward of :mod:`mixers.kernels.value_chain`: the chunks from the last to the first in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.barrier import begin, meet, meetings, n_programs
from mixers.kernels.groups import Groups
from mixers.kernels.launch import launch
from mixers.kernels.read import rows_at_once
from mixers.kernels.read_backward import token_backward
from mixers.kernels.update import step_positions, update_tile_sizes
from mixers.kernels.value_chain import PROGRAMS, REGISTERS


@triton.jit(
    do_not_specialize=[
        "n_table", "n_memories", "n_rows", "n_tokens", "chunk_size", "n_chunks", "lookahead", "last_step",
    ]
)  # fmt: skip
def value_chain_backward_kernel(
    later,  # in and out (M*N,V)
    before,  # (E,V)
    slots,  # (M,R,T,J) int64
    group_of,  # (E,) int64
    factors,  # (E,)
    weights,  # (M,R,T,J)
    pairs,  # (M,R,T,J) int32
    order,
    row,
    first_of,
    count_of,  # (E,) each
    read,  # (M,R,T,V)
    v,  # (M,R,T,V)
    pair_weight,  # (M,R,T)
    d_out,  # (M,R,T,V)
    d_weights,  # (M,R,T,J), ADD_WEIGHTS only
    temperature,
    d_v,  # out (M,R,T,V)
    d_pair_weight,  # out (M,R,T)
    d_half,  # out (M,R,T,H,2,k)
    touched,  # (M*N,) int8, TOUCH only
    d_read,  # scratch (M,S,V)
    arrived,  # of :func:`meetings`
    n_table,
    n_memories,
    n_rows,
    n_tokens,
    chunk_size,
    n_chunks,
    lookahead,
    last_step,
    HEADS: tl.constexpr,
    TOP_K: tl.constexpr,
    VALUE: tl.constexpr,
    ADD_WEIGHTS: tl.constexpr,
    TOUCH: tl.constexpr,
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
    begin(arrived, TIMED)
    for n_done in range(n_chunks):
        chunk = n_chunks - 1 - n_done
        start = chunk * chunk_size
        n_chunk = tl.minimum(chunk_size, n_tokens - start)
        n_queries = n_rows * n_chunk
        for query in range(program, n_memories * n_queries, n_together):
            token_backward(
                query % n_queries, query // n_queries, later, before, slots, group_of, factors, weights, pairs, read, v,
                pair_weight, d_out, d_weights, temperature, d_read, d_v, d_pair_weight, d_half,
                touched, n_table, n_rows, n_chunk, n_tokens, start, lookahead,
                HEADS, TOP_K, VALUE, ADD_WEIGHTS, TOUCH, BLOCK_J, READ_V, ALL_J,
            )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, TIMED)

        if chunk >= last_step:
            first = start.to(tl.int64) * n_memories * n_rows * (HEADS * TOP_K)
            n_positions = n_memories * n_queries * (HEADS * TOP_K)
            for tile in range(program, tl.cdiv(n_positions, BLOCK_G), n_together):
                step_positions(
                    first + tile * BLOCK_G + tl.arange(0, BLOCK_G), first + n_positions, later, d_read, weights,
                    factors, order, row, first_of, count_of, later, touched, n_chunk, n_tokens, start, n_table,
                    HEADS * TOP_K, VALUE, False, False, TOUCH, BLOCK_G, BLOCK_E, STEP_V,
                )  # fmt: skip
        n_meetings += 1
        meet(arrived, n_meetings, TIMED)


def value_chain_backward(
    later: Tensor,
    touched: Tensor | None,
    before: Tensor,
    slots: Tensor,
    group_of: Tensor,
    factors: Tensor,
    weights: Tensor,
    pairs: Tensor,
    groups: Groups,
    read: Tensor,
    v: Tensor,
    pair_weight: Tensor,
    d_out: Tensor,
    d_weights: Tensor | None,
    temperature: float,
    d_v: Tensor,
    d_pair_weight: Tensor,
    d_half: Tensor,
    chunk_size: int,
    lookahead: int,
    *,
    needs_values: bool,
) -> None:
    """Derivatives of all tokens' reads and errors, ``later`` (M,N,V) carried back from chunk to chunk in place.

    ``later`` starts as the derivative of the last table and ends as that of the first, if ``needs_values``. With
    ``touched`` (M,N) int8, 0, it starts as 0 whatever it holds: rows that no later chunk reads are neither set to 0 nor
    read. before (E,V): the rows that each chunk overwrote. See :func:`token_backward` for the others; the table's step
    is the transpose of the read, :func:`step_positions`. The programs of the one launch meet between the two.
    """
    n_memories, n_rows, n_tokens, n_read = slots.shape
    n_heads, top_k, value_dim = d_half.shape[3], d_half.shape[5], v.shape[-1]
    block_v = triton.next_power_of_2(value_dim)
    block_g, block_e, step_v = update_tile_sizes(value_dim)
    d_read = v.new_empty(n_memories * n_rows * min(chunk_size, n_tokens), value_dim)
    n_chunks = triton.cdiv(n_tokens, chunk_size)
    arrived, timed = meetings(v, "value_chain_backward", n_chunks, ("token", "step"))
    launch(
        value_chain_backward_kernel,
        (n_programs(v, PROGRAMS),),
        *(later, before, slots, group_of, factors, weights, pairs, *groups, read, v, pair_weight, d_out),
        *(weights if d_weights is None else d_weights, float(temperature), d_v, d_pair_weight, d_half),
        *(weights if touched is None else touched, d_read),
        *(arrived, later.shape[1], n_memories, n_rows, n_tokens, chunk_size),
        *(n_chunks, lookahead, 0 if needs_values else 1),
        HEADS=n_heads,
        TOP_K=top_k,
        VALUE=value_dim,
        ADD_WEIGHTS=d_weights is not None,
        TOUCH=touched is not None,
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
