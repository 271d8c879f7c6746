"""One part of a call's values beside the keys of the part after it: both chains in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.barrier import n_programs, shared_bytes
from mixers.kernels.key_chain import KEY_SIZES, PROGRAMS, KeyWork, address_chunks, key_arguments
from mixers.kernels.launch import launch
from mixers.kernels.value_chain import VALUE_SIZES, ValueWork, read_and_step_chunks, value_arguments

# Programs of the values' chain on a multiprocessor, and registers a thread that leave room for those of the keys too.
VALUE_PROGRAMS, REGISTERS = 1, 168
# Shared memory of a program at the paper's sizes.
SHARED_BYTES = 48 * 1024


# In this kernel the sizes that both chains have stand twice.
SIZES = [*KEY_SIZES, *(name if name in ("table_step", "lookahead") else f"value_{name}" for name in VALUE_SIZES)]


@triton.jit(do_not_specialize=[*SIZES, "n_value_programs"])
def both_chains_kernel(
    q, keys, indices, measures, probabilities, mean, kept_totals, uses, ranks, q_parts, q_units, q_squares, key_parts,
    key_units, key_squares, room, index_room, pulls, totals, noted, arrived, lr, address_weight, use_scale,
    n_memories, n_rows, n_tokens, chunk_size, n_chunks, n_most, n_most_each, n_steps, n_words,
    table, versions, slots, weights, v, gate, mask, order, group, count, before, after, move, read, squared_error,
    error, value_arrived, table_step, value_n_memories, value_n_rows, value_n_tokens, value_chunk_size,
    value_n_chunks, lookahead,
    n_value_programs,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    TOP_K: tl.constexpr, IDW: tl.constexpr, STEP: tl.constexpr, KEEP: tl.constexpr, LISTS: tl.constexpr,
    BLOCK_L: tl.constexpr, IDW_EPS: tl.constexpr, ENTROPY_EPS: tl.constexpr, RANK_S: tl.constexpr,
    RANK_N: tl.constexpr, RANK_D: tl.constexpr, RANK_STAGES: tl.constexpr, ROWS: tl.constexpr,
    SPLIT_ROWS: tl.constexpr, SPLITS: tl.constexpr, PULL_U: tl.constexpr, PULL_L: tl.constexpr, PULL_C: tl.constexpr,
    PULL_D: tl.constexpr, PULL_STAGES: tl.constexpr, MOVE_U: tl.constexpr, MOVE_E: tl.constexpr, MOVE_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TIMED: tl.constexpr, N_READ: tl.constexpr, VALUE: tl.constexpr,
    VERSIONS: tl.constexpr, GATED: tl.constexpr, MASKED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_J: tl.constexpr,
    READ_V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, STEP_V: tl.constexpr,
):  # fmt: skip
    # Programs are spread over the multiprocessors in turn, but neighbours often share one: the last of each
    # ``of_each`` is for the values, so that none has two of them.
    program = tl.program_id(0)
    of_each = tl.num_programs(0) // n_value_programs
    turn = program // of_each
    if program % of_each == of_each - 1:
        read_and_step_chunks(
            turn, n_value_programs,
            table, versions, slots, weights, v, gate, mask, order, group, count, before, after, move, read,
            squared_error, error, value_arrived, table_step, value_n_memories, value_n_rows, value_n_tokens,
            value_chunk_size, value_n_chunks, lookahead, N_READ, VALUE, VERSIONS, GATED, MASKED, ALIGN, BLOCK_J,
            READ_V, BLOCK_G, BLOCK_E, STEP_V, TIMED,
        )  # fmt: skip
    else:
        address_chunks(
            turn * (of_each - 1) + program % of_each, tl.num_programs(0) - n_value_programs,
            q, keys, indices, measures, probabilities, mean, kept_totals, uses, ranks, q_parts, q_units, q_squares,
            key_parts, key_units, key_squares, room, index_room, pulls, totals, noted, arrived, lr, address_weight,
            use_scale, n_memories, n_rows, n_tokens, chunk_size, n_chunks, n_most, n_most_each, n_steps, n_words,
            HEADS, SUBKEYS, HALF, WIDTH, PARTS, TOP_K, IDW, STEP, KEEP, LISTS, BLOCK_L, IDW_EPS, ENTROPY_EPS, RANK_S,
            RANK_N, RANK_D, RANK_STAGES, ROWS, SPLIT_ROWS, SPLITS, PULL_U, PULL_L, PULL_C, PULL_D, PULL_STAGES,
            MOVE_U, MOVE_E, MOVE_D, BLOCK_N, BLOCK_K, TIMED,
        )  # fmt: skip


def have_room(like: Tensor) -> bool:
    """Whether a multiprocessor of the tensor's device has the shared memory for the programs of both chains."""
    return shared_bytes(like, PROGRAMS + VALUE_PROGRAMS) >= SHARED_BYTES


def both_chains(key_part: KeyWork, value_part: ValueWork, *, goes_on: bool) -> None:
    """:func:`mixers.kernels.key_chain.key_chain` and :func:`mixers.kernels.value_chain.value_chain` side by side.

    Each chain has programs of its own, which meet with one another only: while one chain's wait, the other's work. The
    keys' chain is slower than alone, as its programs have fewer registers, a quarter at the sizes of the paper on an
    H200, but what the values' chain takes beside it costs less than after it.
    """
    n_key_programs, key_values, key_constants = key_arguments(key_part, goes_on=goes_on, n_beside=VALUE_PROGRAMS)
    value_values, value_constants = value_arguments(value_part)
    n_value_programs = n_programs(value_part.table, VALUE_PROGRAMS)
    launch(
        both_chains_kernel,
        (n_key_programs + n_value_programs,),
        *key_values,
        *value_values,
        n_value_programs,
        **key_constants | value_constants,
        num_warps=4,
        cooperative=True,
        max_registers=REGISTERS,
    )
