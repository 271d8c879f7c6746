"""Versions of value rows: which one each access of a call reads, and which one its chunk leaves behind."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.kernels.launch import launch


class Accesses(NamedTuple):
    """Of accesses e = token * J + j, E = M*R*T*J of them, what is known before any row is read.

    A *group* is all accesses of one chunk to one row; it steps the row once and so makes a new *version* of it, whose
    number is the place where the group starts in ``order``. Numbers are those of a row of an (E,V) tensor.

    order (E,) int64: the accesses by row, then chunk, then access. The others are by access: group (E,) int32: the
    number of its group. count (E,) int32: accesses in its group, where it is the group's first; else 0. before (E,)
    int32: the version that it reads; -1: the row of the given table. after (E,) int32: its group, if a later chunk
    reads the row again; else -1. factor (E,): -lr scale / cnt of its row. move (E,): factor times its weight.
    """

    order: Tensor
    group: Tensor
    count: Tensor
    before: Tensor
    after: Tensor
    factor: Tensor
    move: Tensor


@triton.jit(do_not_specialize=["n_accesses", "n_table", "n_chunks", "n_memory_tokens", "n_tokens", "chunk_size"])
def codes_kernel(
    slots,  # (M,R,T,J) int64
    codes,  # out (E,) int32 or int64
    n_accesses,
    n_table,
    n_chunks,
    n_memory_tokens,
    n_tokens,
    chunk_size,
    N_READ: tl.constexpr,
    BLOCK: tl.constexpr,
):
    access = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = access < n_accesses
    token = access // N_READ
    row = (token // n_memory_tokens).to(tl.int64) * n_table + tl.load(slots + access, exists, 0)
    code = row * n_chunks + token % n_tokens // chunk_size
    tl.store(codes + access, code.to(codes.dtype.element_ty), exists)


@triton.jit
def first_from(codes, wanted, low, high):
    """The first place in low .. high, of ascending ``codes``, with a code of at least ``wanted``; else ``high``."""
    while tl.sum((low < high).to(tl.int32), axis=0) > 0:
        searching = low < high
        middle = (low + high) // 2
        is_below = tl.load(codes + middle, searching, 0) < wanted
        low = tl.where(searching & is_below, middle + 1, low)
        high = tl.where(searching & (is_below == 0), middle, high)
    return low


@triton.jit
def run_start(codes, place, code, exists):
    """The first place of the run of equal codes around ``place``: a few steps where runs are short."""
    going = exists & (place > 0)
    low, high = tl.where(going, 0, place), place
    step = 1
    while tl.sum(going.to(tl.int32), axis=0) > 0:
        probe = tl.maximum(high - step, 0)
        is_same = tl.load(codes + probe, going, 0) == code
        low = tl.where(going & (is_same == 0), probe + 1, low)
        high = tl.where(going & is_same, probe, high)
        going = going & is_same & (probe > 0)
        step *= 2
    return first_from(codes, code, low, high)


@triton.jit
def run_end(codes, place, code, exists, n_codes):
    """The place after the last of the run of equal codes around ``place``."""
    low = place + 1
    high = tl.where(exists, n_codes, low)
    going = low < high
    step = 1
    while tl.sum(going.to(tl.int32), axis=0) > 0:
        probe = tl.minimum(low + step - 1, n_codes - 1)
        is_same = tl.load(codes + probe, going, 0) == code
        high = tl.where(going & (is_same == 0), probe, high)
        low = tl.where(going & is_same, probe + 1, low)
        going = going & is_same & (low < n_codes)
        step *= 2
    return first_from(codes, code + 1, low, high)


@triton.jit(do_not_specialize=["n_accesses", "n_table", "n_memories", "n_chunks"])
def versions_kernel(
    codes,  # (E,) ascending
    order,  # (E,) int64
    weights,  # (E,)
    scale,  # (n_chunks,M)
    group,  # out, by access
    count,
    before,
    after,
    factor,
    move,
    n_accesses,
    n_table,
    n_memories,
    n_chunks,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = place < n_accesses
    code = tl.load(codes + place, exists, 0)
    access = tl.load(order + place, exists, 0)
    weight = tl.load(weights + access, exists, 0.0)
    row = code // n_chunks
    rate = tl.load(scale + code % n_chunks * n_memories + row // n_table, exists, 0.0)
    first = run_start(codes, place, code, exists)
    end = run_end(codes, place, code, exists, n_accesses)
    n_group = end - first
    has_earlier = exists & (first > 0)
    earlier = tl.load(codes + first - 1, has_earlier, 0)
    has_earlier = has_earlier & (earlier // n_chunks == row)
    earlier_first = run_start(codes, first - 1, earlier, has_earlier)
    has_later = exists & (end < n_accesses)
    has_later = has_later & (tl.load(codes + end, has_later, 0) // n_chunks == row)
    rate = rate / tl.maximum(n_group, 1).to(rate.dtype)
    tl.store(group + access, first, exists)
    tl.store(count + access, tl.where(place == first, n_group, 0), exists)
    tl.store(before + access, tl.where(has_earlier, earlier_first, -1), exists)
    tl.store(after + access, tl.where(has_later, first, -1), exists)
    tl.store(factor + access, rate, exists)
    tl.store(move + access, rate * weight, exists)


def find_versions(slots: Tensor, weights: Tensor, scale: Tensor, n_slots: int, chunk_size: int) -> Accesses:
    """Group the accesses of slots (M,R,T,J) int64 with their weights by one stable sort, without waiting on the host.

    scale (n_chunks,M): -lr times the scale of the update. Bytes: 4 radix passes over 12 E (codes below 2^31) or 8 over
    16 E; 40 E beside.
    """
    n_memories, n_rows, n_tokens, n_read = slots.shape
    n_accesses, n_chunks = slots.numel(), -(-n_tokens // chunk_size)
    assert n_accesses < 2**31, "accesses are counted in 32 bits"
    n_codes = n_memories * n_slots * n_chunks
    codes = torch.empty(n_accesses, dtype=torch.int32 if n_codes < 2**31 else torch.int64, device=slots.device)
    block = 256
    grid = (triton.cdiv(n_accesses, block),)
    sizes = (n_accesses, n_slots, n_chunks, n_rows * n_tokens, n_tokens, chunk_size)
    launch(codes_kernel, grid, slots, codes, *sizes, N_READ=n_read, BLOCK=block, num_warps=4)
    codes, order = torch.sort(codes, stable=True)
    numbers = torch.empty(4, n_accesses, dtype=torch.int32, device=slots.device)
    shares = weights.new_empty(2, n_accesses)
    launch(
        versions_kernel,
        grid,
        *(codes, order, weights, scale, *numbers, *shares, n_accesses, n_slots, n_memories, n_chunks),
        BLOCK=block,
        num_warps=4,
    )
    return Accesses(order, *numbers, *shares)
