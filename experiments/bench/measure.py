"""Time and peak memory of operations. Arms are timed in turn, so that a machine's drift hits all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Hashable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch

from experiments.bench.operations import Operation
from experiments.cost import PeakMemory
from experiments.device import Compute

Item = TypeVar("Item", bound=Hashable)
# An operation that has taken so long in all is not repeated.
ENOUGH_S = 15.0
# Short operations are called for so long in a turn.
TURN_S = 0.03
# One that takes longer than this is called once, others once before without counting.
SETTLED_S = 3.0


def seconds(operation: Operation, device: str) -> float:
    """Wall time of one call; on CUDA until the device has finished."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        operation()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    operation()
    return time.perf_counter() - started


def _in_a_row(operation: Operation, n_calls: int) -> list[float]:
    """Seconds between the ends of calls that are sent off without waiting for one another."""
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(n_calls + 1)]
    operation()
    ends[0].record()
    for end in ends[1:]:
        operation()
        end.record()
    ends[-1].synchronize()
    return [before.elapsed_time(end) / 1e3 for before, end in pairwise(ends)]


def turn(operation: Operation, device: str, short_s: float = TURN_S) -> float:
    """Seconds of a call: of a short one the median of all that fit into ``short_s``, after one that doesn't count.

    When it is its turn again, caches hold what others have used, threads may sleep, and memory that another has given
    back is slow to come: on a virtual machine the first call after the dense baseline's took up to 15 times as long.
    On CUDA the calls of a turn follow each other without waiting for the device, as the steps of a training do.
    """
    first = seconds(operation, device)
    if first > SETTLED_S:
        return first
    if device == "cuda":
        return statistics.median(_in_a_row(operation, max(1, math.ceil(short_s / first))))
    times, began = [], time.monotonic()
    while not times or time.monotonic() - began < short_s:
        times.append(seconds(operation, device))
    return statistics.median(times)


def turns(
    cases: list[Item], times: dict[Item, list[float]], n_repeats: int, enough_s: float = ENOUGH_S
) -> Iterator[Item]:
    """The case to call next, ``n_repeats`` rounds of all; those that have taken ``enough_s`` in all are passed over.

    The order turns by one each round, as a call leaves caches behind for the next.
    """
    for index in range(n_repeats):
        turn = index % max(len(cases), 1)
        for case in cases[turn:] + cases[:turn]:
            if len(times[case]) < n_repeats and sum(times[case]) < enough_s:
                yield case


def spread(times: list[float]) -> dict[str, float | int]:
    return {
        "seconds": statistics.median(times),
        "seconds_min": min(times),
        "seconds_max": max(times),
        "n_repeats": len(times),
    }


def copy_bandwidth(device: str, n_bytes: int = 2**28) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> object:
        return target.copy_(source)

    copy()
    return 2 * n_bytes / statistics.median(seconds(copy, device) for _ in range(7))


def cuda_peak(operation: Operation) -> int:
    """Device memory that a call needs on top of what is allocated when it starts, its result included."""
    torch.cuda.synchronize()
    peak, before = PeakMemory(Compute(torch.device("cuda"), None)), torch.cuda.memory_allocated()
    operation()
    torch.cuda.synchronize()
    return peak.bytes() - before


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not allocate; torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in str(error)


class OutOfMemory(RuntimeError):
    """A case that needs more memory than there is."""


def status_bytes(field: str, path: str = "/proc/self/status") -> int:
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
