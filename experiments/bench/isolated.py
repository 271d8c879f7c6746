"""Each timed operation in a process of its own, called when it is its turn.

In one process operations disturb each other: beside the dense baseline, which allocates and frees tables of 0.5 GB, a
sparse training step took 7 times as long as alone, most of it in the system, faulting in memory anew at every call.

The processes are forked from a server that has imported everything and computed nothing, where the system can fork: one
starts within some 0.1 s, and finds neither memory nor threads of another.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from experiments.bench import model
from experiments.bench.case import FAILED, NO_MEMORY, Case
from experiments.bench.measure import cuda_peak, is_out_of_memory, seconds, status_bytes, turn
from experiments.bench.operations import Operation, Workbench
from experiments.cost import PeakMemory
from experiments.device import Compute
from experiments.errors import UserError

Result = TypeVar("Result")
# What the server imports: this module, and what torch imports late, at the first call of a layer (3 s).
PRELOADED = [__name__, "torch._dynamo"]
# A first call that takes so long is counted.
COUNTED_S = 5.0


class Failed(Exception):
    """A case that holds no time: ``status`` of :mod:`experiments.bench.case`, and why."""

    def __init__(self, status: str, note: str) -> None:
        super().__init__(status, note)
        self.status, self.note = status, note


class FirstCalls(NamedTuple):
    """times: those of the first calls that count already. peak_bytes: None where it isn't measured."""

    times: list[float]
    peak_bytes: int | None


class Arm:
    """A case in a process of its own, from its first calls to ``close``. ``size`` is that of scene ``model``.

    ``start`` and ``turn`` raise :class:`Failed`, after which the process has ended.
    """

    def __init__(self, case: Case, n_threads: int, with_memory: bool, size: model.ModelSize) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        arguments = (theirs, case, n_threads, with_memory, size)
        self._process = _context().Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def start(self) -> FirstCalls:
        """Wait for the first calls."""
        return self._received()

    def turn(self) -> float:
        """Seconds of a call, by :func:`experiments.bench.measure.turn`."""
        with suppress(OSError):  # one that has ended says why, or nothing, in what is received
            self._pipe.send("turn")
        return self._received()

    def _received(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            answer = _reason_of(self._process.exitcode)
        if isinstance(answer, Failed):
            self.close()
            raise answer
        return answer

    def close(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """What ``function`` returns in a process of its own, so that this one gets no CUDA context of it.

    Raises:
        UserError: as the function raised it.
        RuntimeError: anything else went wrong there.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = _context().Process(
        target=_answer, args=(theirs, function, arguments, torch.get_num_threads()), daemon=True
    )
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(_reason_of(process.exitcode).note) from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _reason_of(exit_code: int | None) -> Failed:
    if exit_code == -signal.SIGKILL:
        return Failed(NO_MEMORY, "its process was killed, as systems do that have no memory left")
    return Failed(FAILED, f"its process ended with {exit_code}")


def outcome(error: Exception) -> Failed:
    """What a case that raised ``error`` has for a time."""
    text = " ".join(str(error).split())[:300]
    if is_out_of_memory(error):
        return Failed(NO_MEMORY, text)
    return Failed(FAILED, text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], n_threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal; who started this one ends it
    torch.set_num_threads(n_threads)
    try:
        pipe.send(function(*arguments))
    except UserError as error:
        pipe.send(error)
    except Exception as error:  # noqa: BLE001  told to who asked
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _serve(pipe: Connection, case: Case, n_threads: int, with_memory: bool, size: model.ModelSize) -> None:
    """The process of an :class:`Arm`: its first calls, then a call or more for every word that comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # to look for garbage in all that is imported would take longer than a small case
    torch.set_num_threads(n_threads)
    try:
        operation, found = _first_calls(case, with_memory, size)
        pipe.send(found)
        while True:
            pipe.recv()
            pipe.send(turn(operation, case.device))
    except (EOFError, BrokenPipeError):
        return  # nobody asks any more
    except Exception as error:  # noqa: BLE001  whatever a case raises is its result
        pipe.send(outcome(error))


def _first_calls(case: Case, with_memory: bool, size: model.ModelSize) -> tuple[Operation, FirstCalls]:
    """A first call on the CPU that takes long is counted: starting up is nothing to it. On CUDA none is, as it may
    compile and tune kernels for minutes."""
    if case.device == "cuda":
        operation = _prepare(case, size)
        seconds(operation, case.device)
        return operation, FirstCalls([], cuda_peak(operation))
    _limit_memory()
    if with_memory:
        # A small twin first: libraries and threads that a first call brings are not the operation's.
        small = Case(**(case.as_dict() | {"n": max(16, case.top_k), "tokens": 2 * case.chunk, "batch": 1}))
        _prepare(small, size)()
    operation = _prepare(case, size)
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only: hands back what has been freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    peak, before = PeakMemory(Compute(torch.device("cpu"), None)), _resident_bytes()
    first = seconds(operation, case.device)
    peak_bytes = None if before is None or not with_memory else max(peak.bytes() - before, 0)
    return operation, FirstCalls([first] if first > COUNTED_S else [], peak_bytes)


def _prepare(case: Case, size: model.ModelSize) -> Operation:
    if case.scene == "model":
        return model.training_step(case, size)
    return Workbench().prepare(case)


def _limit_memory() -> None:
    """Nine tenths of what is free now, so that a case too large fails here, and nothing else does."""
    if _resident_bytes() is not None:
        limit = status_bytes("VmData") + status_bytes("MemAvailable", "/proc/meminfo") * 9 // 10
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _resident_bytes() -> int | None:
    return status_bytes("VmRSS") if Path("/proc/self/status").exists() else None
