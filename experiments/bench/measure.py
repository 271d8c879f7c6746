"""Time and peak memory of operations. Arms are timed in turn, so that a machine's drift hits all alike."""

from __future__ import annotations

import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from experiments.bench.case import Case
from experiments.bench.operations import Operation, Workbench
from experiments.cost import PeakMemory
from experiments.device import Compute

Item = TypeVar("Item", bound=Hashable)
# An operation that has taken so long in all is not repeated.
ENOUGH_S = 15.0
# A first call on the CPU that takes so long needs no warm-up: it is counted.
NO_WARM_UP_S = 5.0


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


def warm_up(operation: Operation, device: str) -> list[float]:
    """One or two calls that don't count, unless the first is so long that starting up is nothing to it. On CUDA a first
    call never counts: it may compile and tune kernels for minutes."""
    first = seconds(operation, device)
    if first > NO_WARM_UP_S and device != "cuda":
        return [first]
    if first < 1 or device == "cuda":
        seconds(operation, device)
    return []


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

    warm_up(copy, device)
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


def cpu_peak(case: Case, n_threads: int) -> int | None:
    """Growth of the resident set over one call, in a fresh process that no earlier call has left memory to.

    The process may take nine tenths of what is free, so that a case too large fails there, and only there. None where
    the system doesn't tell (no /proc).

    Raises:
        OutOfMemory: the case does not fit.
    """
    if not Path("/proc/self/status").exists():
        return None
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench.measure"],
        input=json.dumps({"case": case.as_dict(), "n_threads": n_threads}),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    if done.returncode == 0:
        return json.loads(done.stdout)["peak_bytes"]
    lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
    if done.returncode in (-9, 137) or "OutOfMemory" in lines[-1]:
        raise OutOfMemory("needs more memory than is free here")
    raise RuntimeError(lines[-1])


def status_bytes(field: str, path: str = "/proc/self/status") -> int:
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _measure_here(case: Case) -> int:
    """:func:`cpu_peak` of this process, which has done nothing else."""
    limit = status_bytes("VmData") + status_bytes("MemAvailable", "/proc/meminfo") * 9 // 10
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        # A small twin first: libraries and threads that a first call brings are not the operation's.
        small = Case(**(case.as_dict() | {"n": max(16, case.top_k), "tokens": 2 * case.chunk, "batch": 1}))
        Workbench().prepare(small)()
        operation = Workbench().prepare(case)
        gc.collect()
        peak, before = PeakMemory(Compute(torch.device("cpu"), None)), status_bytes("VmRSS")
        operation()
        return max(peak.bytes() - before, 0)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory("needs more memory than is free here") from None
        raise


def main(read: Callable[[], str] = sys.stdin.read) -> None:
    asked = json.loads(read())
    torch.set_num_threads(asked["n_threads"])
    print(json.dumps({"peak_bytes": _measure_here(Case(**asked["case"]))}))


if __name__ == "__main__":
    main()
