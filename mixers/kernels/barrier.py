"""All programs of one launch meet, so that a kernel can do a whole chain of steps that wait for one another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda


@triton.jit
def meet(arrived, n_meetings, program, n_together, TIMED: tl.constexpr):
    """Wait until each of ``n_together`` programs has come to its meeting number ``n_meetings``, counted from 1.

    What any program wrote before is seen by all after: its stores come before the counter's release, the others'
    loads after the counter's acquire. ``arrived`` is from :func:`meetings`. All programs must be on the device at
    once: launch with ``cooperative=True`` and as many as :func:`n_programs` says.
    """
    target = n_meetings.to(tl.int64) * n_together
    tl.debug_barrier()
    n_arrived = tl.atomic_add(arrived, 1, sem="acq_rel") + 1
    while n_arrived < target:
        n_arrived = tl.atomic_add(arrived, 0, sem="acquire")
    tl.debug_barrier()
    if TIMED:
        _note_time(arrived + 1 + n_meetings, program)


@triton.jit
def begin(arrived, program, TIMED: tl.constexpr):
    """Note the time before the first meeting."""
    if TIMED:
        _note_time(arrived + 1, program)


@triton.jit
def _note_time(at, program):
    if program == 0:
        tl.store(at, cuda.globaltimer().to(tl.int64))


_timed: list[tuple[str, Tensor, tuple[str, ...]]] | None = None


def meetings(
    like: Tensor, kernel: str, n_chunks: int, steps: tuple[str, ...], n_before: int = 0
) -> tuple[Tensor, bool]:
    """The counter of a launch's meetings, and whether to time them: ``n_before``, the last of which notes the time in
    place of :func:`begin`, and one at the end of each of ``steps`` of each chunk."""
    if _timed is None:
        return torch.zeros(1, dtype=torch.int64, device=like.device), False
    arrived = torch.zeros(2 + n_before + n_chunks * len(steps), dtype=torch.int64, device=like.device)
    _timed.append((kernel, arrived[n_before:], steps))
    return arrived, True


@contextmanager
def timed_meetings() -> Iterator[dict[str, dict[str, float]]]:
    """In this context the chains note when their programs meet; after it the dictionary holds, per kernel, the
    milliseconds that each step took in all. CUDA only."""
    global _timed
    found: dict[str, dict[str, float]] = {}
    _timed = []
    try:
        yield found
        for kernel, arrived, steps in _timed:
            n_chunks = (arrived.numel() - 2) // len(steps)
            # A meeting that did not take place has no time.
            took = arrived[1:].diff().where(arrived[2:] > 0, 0).unflatten(0, (n_chunks, len(steps))).sum(0) / 1e6
            before = found.get(kernel, dict.fromkeys(steps, 0.0))
            found[kernel] = {step: before[step] + ms for step, ms in zip(steps, took.tolist(), strict=True)}
    finally:
        _timed = None


def n_programs(like: Tensor, per_processor: int) -> int:
    """How many programs to launch: ``per_processor`` on each multiprocessor of the tensor's device; interpreted: one.

    Registers for two programs of four warps are always there; more need a limit of registers at the launch.
    """
    return _properties(like.device).multi_processor_count * per_processor if like.device.type == "cuda" else 1


def shared_bytes(like: Tensor, per_processor: int) -> int:
    """Shared memory that each of ``per_processor`` programs may take on the tensor's device; without one: an H100's."""
    whole = _properties(like.device).shared_memory_per_multiprocessor if like.device.type == "cuda" else 228 * 1024
    # A program itself takes 1 KB.
    return whole // per_processor - 1024


@cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)
