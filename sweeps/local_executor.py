"""The executor of this machine: one process per worker, nothing else to start."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sweeps
from experiments.errors import UserError
from experiments.records import OUT_OF_MEMORY
from sweeps.executor import (
    MAX_FAILED_STARTS,
    MAX_KILLED_STARTS,
    STALL_PATIENCE_S,
    TARGET,
    Ended,
    Executor,
    ExecutorEvent,
    Job,
    Lost,
    Reported,
    Started,
)

# Imports from a slow disk may take minutes; a worker that has not come so far then will never be ready.
START_PATIENCE_S = 600.0
EXIT_PATIENCE_S = 2.0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    events: int  # read end of its pipe
    log: Path
    heard_at: float
    buffer: bytes = b""
    ready: bool = False
    leaving: bool = False
    stuck: bool = False
    key: str | None = None
    n_memory_kills: int | None = None  # of this machine, when its job began


@dataclass
class LocalExecutor(Executor):
    """Persistent worker processes of this machine, in sessions of their own, that die with this one.

    Each imports torch once and then trains job after job; jobs go in as JSON lines on stdin, events come back as
    JSON lines of less than 4 KB on a pipe. A worker that goes away is replaced, and so is one that holds a job and
    says nothing for ``patience_s``, 0: however long. ``gpus`` are dealt out in turn. ``environment`` is added to this
    process's own; workers are numbered from ``first``.
    """

    folder: Path
    count: int
    n_threads: int
    plugins: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    target: str = TARGET
    patience_s: float = STALL_PATIENCE_S
    environment: dict[str, str] = field(default_factory=dict)
    first: int = 0
    _workers: dict[int, _Worker] = field(default_factory=dict)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _failed_starts: int = 0
    _interrupted: bool = False

    def __post_init__(self) -> None:
        for number in range(self.first, self.first + self.count):
            self._start(number)

    @property
    def n_workers(self) -> int:
        return self.count

    @property
    def n_free(self) -> int:
        return 0 if self._interrupted else sum(_is_free(worker) for worker in self._workers.values())

    @property
    def busy(self) -> frozenset[str]:
        return frozenset(worker.key for worker in self._workers.values() if worker.key is not None)

    def submit(self, job: Job) -> None:
        worker = next(worker for worker in self._workers.values() if _is_free(worker))
        worker.key = job.key
        worker.heard_at = time.monotonic()
        worker.n_memory_kills = memory_kills()
        line = json.dumps(asdict(job), allow_nan=False).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # it has just gone away: the end of its event pipe will say so
            worker.process.stdin.write(line)
            worker.process.stdin.flush()

    def poll(self, timeout_s: float) -> list[ExecutorEvent]:
        found: list[ExecutorEvent] = []
        for ready, _ in self._selector.select(timeout_s):
            found.extend(self._read(ready.data))
        self._end_stuck()
        return found

    def interrupt(self) -> None:
        self._interrupted = True
        for worker in self._workers.values():
            worker.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        self._interrupted = True
        for worker in self._workers.values():
            worker.process.kill()  # an idle one has nothing left to save, and torch takes its time to go
        for worker in self._workers.values():
            _close_stdin(worker)
            worker.process.wait()
            self._selector.unregister(worker.events)
            os.close(worker.events)
        self._workers.clear()
        self._selector.close()

    def _end_stuck(self) -> None:
        """Kill workers that are silent with a job or never get ready; the end of their pipe says the rest."""
        now = time.monotonic()
        for worker in self._workers.values():
            if worker.ready and worker.key is None:
                continue
            patience_s = self.patience_s if worker.ready else max(self.patience_s, START_PATIENCE_S)
            if self.patience_s and now - worker.heard_at > patience_s:
                worker.stuck = True
                worker.process.kill()

    def _start(self, number: int) -> None:
        reading, writing = os.pipe()
        log = self.folder / f".worker-{number}.log"
        command = [sys.executable, "-P", "-m", "sweeps.worker", "--events", str(writing), "--driver", str(os.getpid())]
        command += ["--threads", str(self.n_threads), "--target", self.target]
        command += [word for plugin in self.plugins for word in ("--plugin", plugin)]
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=self._environment(number),
                pass_fds=(writing,),
                start_new_session=True,  # Ctrl-C in the terminal reaches the driver alone
            )
        os.close(writing)
        self._workers[number] = _Worker(process, reading, log, time.monotonic())
        self._selector.register(reading, selectors.EVENT_READ, number)

    def _environment(self, number: int) -> dict[str, str]:
        top = str(Path(sweeps.__file__).resolve().parent.parent)
        path = os.pathsep.join([top, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, **self.environment, "PYTHONPATH": path, "OMP_NUM_THREADS": str(self.n_threads)}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[number % len(self.gpus)]
        return environment

    def _read(self, number: int) -> list[ExecutorEvent]:
        worker = self._workers[number]
        chunk = os.read(worker.events, 1 << 16)
        if not chunk:
            return self._gone(number)
        worker.heard_at = time.monotonic()
        *lines, worker.buffer = (worker.buffer + chunk).split(b"\n")
        return [event for line in lines if (event := self._event(number, json.loads(line))) is not None]

    def _event(self, number: int, message: dict[str, Any]) -> ExecutorEvent | None:
        worker = self._workers[number]
        kind = message.pop("event")
        if kind == "ready":
            worker.ready = True
            self._failed_starts = 0
            return None
        if kind == "started":
            return Started(worker.key, number)
        if kind == "progress":
            return Reported(worker.key, number, **message)
        assert kind == "ended", kind
        key, worker.key, worker.leaving = worker.key, None, message["leaving"]
        return Ended(key, number, message.get("halt", ""))

    def _gone(self, number: int) -> list[ExecutorEvent]:
        """The pipe's other end is closed: the process is dead, or about to be."""
        worker = self._workers.pop(number)
        self._selector.unregister(worker.events)
        os.close(worker.events)
        _close_stdin(worker)
        try:
            worker.process.wait(EXIT_PATIENCE_S)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
        if not worker.ready and not self._interrupted:
            self._failed_starts += 1
            was_killed = worker.process.returncode == -signal.SIGKILL and not worker.stuck
            if self._failed_starts >= (MAX_KILLED_STARTS if was_killed else MAX_FAILED_STARTS):
                raise UserError(f"workers can't start: {_last_line(worker.log)} (see {worker.log})")
        if not self._interrupted:
            self._start(number)
        if worker.key is None:
            return []
        return [self._lost(worker, number)]

    def _lost(self, worker: _Worker, number: int) -> Lost:
        code = worker.process.returncode
        if worker.stuck:
            return Lost(worker.key, number, f"no sign of life for {self.patience_s:g} s")
        if code != -signal.SIGKILL:
            return Lost(worker.key, number, _exit_reason(code))
        before, now = worker.n_memory_kills, memory_kills()
        if before is None or now is None:
            return Lost(worker.key, number, f"{_exit_reason(code)} (often: {OUT_OF_MEMORY})")
        if now > before:
            return Lost(worker.key, number, f"{OUT_OF_MEMORY}: the system ended the worker")
        return Lost(worker.key, number, _exit_reason(code), from_outside=True)


def memory_kills() -> int | None:
    """Processes that this machine has killed for want of memory since it started; None where it doesn't say."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def _is_free(worker: _Worker) -> bool:
    return worker.ready and not worker.leaving and worker.key is None


def _close_stdin(worker: _Worker) -> None:
    with contextlib.suppress(BrokenPipeError):  # a job that it never read
        worker.process.stdin.close()


def _exit_reason(code: int) -> str:
    if code >= 0:
        return f"the worker exited with code {code}"
    return f"the worker was ended by signal {signal.Signals(-code).name}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
