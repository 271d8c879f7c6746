"""Peak memory of a layer on the CPU: each case in a process of its own, forked from one that has imported everything.

The parent computes nothing: neither memory that an earlier case has left nor threads get into a child.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from experiments.bench.layers import Bench, Measured, Point
from experiments.bench.measure import OutOfMemory, is_out_of_memory, status_bytes
from experiments.cost import PeakMemory
from experiments.device import Compute

# The first call is this long at most: it brings libraries' own buffers, which aren't the case's.
FIRST_TOKENS = 128
FULL = "out of memory"
READY = "ready"


class PeakServer:
    """Peak memory on request; ``close`` when done. None as an answer: this system doesn't tell (no /proc, no fork)."""

    def __init__(self, layers: list[Measured], plugins: tuple[str, ...], n_threads: int, seed: int) -> None:
        self._process: subprocess.Popen[str] | None = None
        if not Path("/proc/self/status").exists() or not hasattr(os, "fork"):
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.bench.peak"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            start_new_session=True,  # a Ctrl-C is ours to pass on
        )
        about = [layer._asdict() for layer in layers]
        files = [str(Path(plugin).resolve()) for plugin in plugins]
        self._ask({"layers": about, "plugins": files, "n_threads": n_threads, "seed": seed})

    def bytes(self, point: Point) -> int | None:
        """What the resident set grows by during one call.

        Raises:
            OutOfMemory: the case needs more than nine tenths of what is free.
            RuntimeError: the case failed.
        """
        if self._process is None:
            return None
        answer = self._ask(asdict(point))
        if "peak_bytes" in answer:
            return answer["peak_bytes"]
        if answer["error"] == FULL:
            raise OutOfMemory("needs more memory than is free here")
        raise RuntimeError(answer["error"])

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None
        sent, received = self._process.stdin, self._process.stdout
        assert sent is not None
        assert received is not None
        sent.write(json.dumps(question) + "\n")
        sent.flush()
        line = received.readline()
        if not line:
            raise RuntimeError(f"the process that measures memory ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@contextmanager
def peak_server(*arguments: Any) -> Iterator[PeakServer]:
    server = PeakServer(*arguments)
    try:
        yield server
    finally:
        server.close()


def serve(questions: IO[str], answers: IO[str]) -> None:
    """The parent: one line with the layers, then one line for each case; one line of JSON answers each."""
    from mixers import registry

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    asked = json.loads(questions.readline())
    for plugin in asked["plugins"]:
        registry.load_plugin(plugin)
    registry.load_all()
    layers = {about["label"]: Measured(**about) for about in asked["layers"]}
    gc.freeze()  # to look for garbage in all that is imported would take each child longer than a small case
    print(json.dumps({"status": READY}), file=answers, flush=True)
    for line in questions:
        point = Point(**json.loads(line))
        answer = _in_a_child(layers[point.label], point, asked["n_threads"], asked["seed"])
        print(json.dumps(answer), file=answers, flush=True)


def _in_a_child(measured: Measured, point: Point, n_threads: int, seed: int) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        answer = _answer(measured, point, n_threads, seed)
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if text:
        return json.loads(text)
    code = os.waitstatus_to_exitcode(status)
    return {"error": FULL if code == -9 else f"the process of this case ended with {code}"}


def _answer(measured: Measured, point: Point, n_threads: int, seed: int) -> dict[str, Any]:
    try:
        return {"peak_bytes": _measure_here(measured, point, n_threads, seed)}
    except Exception as error:  # noqa: BLE001  whatever a case raises is its result
        full = isinstance(error, MemoryError) or is_out_of_memory(error)
        return {"error": FULL if full else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _measure_here(measured: Measured, point: Point, n_threads: int, seed: int) -> int:
    torch.set_num_threads(n_threads)
    limit = status_bytes("VmData") + status_bytes("MemAvailable", "/proc/meminfo") * 9 // 10
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    bench = Bench(measured, Compute(torch.device("cpu"), None), seed)
    bench.operation(Point(point.label, point.scene, min(point.tokens, FIRST_TOKENS)))()
    operation = bench.operation(point)
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only: hands back what the first call has freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    peak, before = PeakMemory(Compute(torch.device("cpu"), None)), status_bytes("VmRSS")
    operation()
    return max(peak.bytes() - before, 0)


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
