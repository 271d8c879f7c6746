"""Large uninitialised tensors on the CPU, in memory that earlier calls have used and given back.

Memory that comes fresh from the system costs about as much as what is done with it here: its pages are cleared one by
one when they are first written, and several times as slowly beside a process that gives memory back.
"""

from __future__ import annotations

import functools
import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

# Of a call with a tensor of this size, the rest is worth being kept too.
NOTABLE_BYTES = 2**20
LARGE_BYTES = 8 * 2**20
# What no tensor uses any more and is kept for the next call, at most.
KEPT_BYTES = 128 * 2**20
# glibc maps no block for itself that is larger.
LARGEST_MAPPED_BYTES = 31 * 2**20

_kept: list[mmap.mmap] = []  # those given back last come last


def room_for(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor of ``shape``, with dtype and device of ``like``.

    A large one on the CPU lies on huge pages where the system has them: 64 MiB on Linux come in 15 ms so, and in 42 ms
    otherwise. Its memory is kept for another such tensor when the last that shares it is gone.
    """
    n_bytes = torch.Size(shape).numel() * like.element_size()
    if like.device.type == "cpu" and n_bytes >= NOTABLE_BYTES:
        _let_the_heap_keep()
    if like.device.type != "cpu" or n_bytes < LARGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    memory = _take(n_bytes)
    if memory is None:
        try:
            memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # no huge pages, or no memory, which torch says in its own words
            return like.new_empty(shape)
    # The storage, which all views of the tensor share, is all that keeps this view of the memory.
    buffer = memoryview(memory)[:n_bytes]
    weakref.finalize(buffer, _keep, memory).atexit = False
    return like.new_empty(0).set_(torch.frombuffer(buffer, dtype=like.dtype).untyped_storage(), 0, shape)


@functools.cache
def _let_the_heap_keep() -> None:
    """Once: have glibc keep freed memory of the process, up to twice this block. Its measure is the largest block that
    it mapped and saw freed. Else what a chunk needs for a moment goes back to the system and is cleared again for the
    next: some 5,000 pages of 4 KB in a call. Nothing is written to the block."""
    torch.empty(LARGEST_MAPPED_BYTES, dtype=torch.uint8)


# A tensor may die at any step of these, in this thread or another: each change of the list is one step.
def _take(n_bytes: int) -> mmap.mmap | None:
    """The smallest kept memory of at least that many bytes, and at most twice as many."""
    while fitting := [memory for memory in _kept if n_bytes <= len(memory) <= 2 * n_bytes]:
        smallest = min(fitting, key=len)
        with suppress(ValueError):  # another has just taken it
            _kept.remove(smallest)
            return smallest
    return None


def _keep(memory: mmap.mmap) -> None:
    _kept.append(memory)
    while sum(map(len, _kept)) > KEPT_BYTES:
        with suppress(IndexError):
            _kept.pop(0)
