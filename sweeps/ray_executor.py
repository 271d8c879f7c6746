"""The executor of a Ray cluster: Ray finds the machines, each worker is the same process as anywhere else.

A *station* is a Ray actor that holds the CPUs and the share of a GPU of one worker, and runs that worker beside it on
its machine with :class:`LocalExecutor`. So a training has a process of its own, with signals, log and limits as on one
machine, and dies with its station, which dies with the driver. Ray retries nothing: the driver counts the attempts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.records import OUT_OF_MEMORY
from sweeps.executor import (
    MAX_KILLED_STARTS,
    STALL_PATIENCE_S,
    TARGET,
    Ended,
    Executor,
    ExecutorEvent,
    Job,
    Lost,
)
from sweeps.local_executor import LocalExecutor
from sweeps.resources import RayShare
from sweeps.worker import output_to

AUTO = "auto"
# A station answers so often while its worker is silent; until then an interrupt waits its turn.
ANSWER_EVERY_S = 0.25
# Of the machine that a cluster's address names.
ANSWER_WITHIN_S = 10.0
# How much longer than its worker a station may be silent: it ends a stuck worker itself.
STATION_GRACE_S = 30.0
# How Ray names that it has ended a process because its machine ran out of memory.
RAY_OUT_OF_MEMORY = "NODE_OUT_OF_MEMORY"
# Variables that workers need wherever they run: addresses and credentials of the tracking store and its artifacts.
CARRIED = ("MIXLAB_", "MLFLOW_", "AWS_", "AZURE_", "GOOGLE_")


class Station:
    """What runs on a machine of the cluster: one worker, and the ear for it."""

    def __init__(self) -> None:
        self._executor: LocalExecutor | None = None

    def open(self, options: dict[str, Any]) -> tuple[list[ExecutorEvent], bool]:
        folder: Path = options["folder"]
        if not folder.is_dir():
            raise UserError(
                f"--ray: {socket.gethostname()} has no {folder}: all machines have to share the runs folder"
            )
        self._executor = LocalExecutor(count=1, **options)
        return self.listen()

    def run(self, job: Job) -> tuple[list[ExecutorEvent], bool]:
        self._executor.submit(job)
        return self.listen()

    def listen(self) -> tuple[list[ExecutorEvent], bool]:
        """Events of the worker, waited for a moment, and whether it can take a job."""
        return self._executor.poll(ANSWER_EVERY_S), self._executor.n_free > 0

    def interrupt(self) -> None:
        self._executor.interrupt()


@dataclass
class _Slot:
    station: Any  # handle of the actor
    answer: Any = None  # reference to what it was asked for last; None while it has nothing to tell
    asked_at: float = 0.0
    opened: bool = False  # the cluster has found a place for it
    free: bool = False
    stuck: bool = False
    key: str | None = None

    def ask(self, answer: Any) -> None:
        self.answer, self.asked_at = answer, time.monotonic()


@dataclass
class RayExecutor(Executor):
    """Stations on the cluster that this process is connected to; a lost one is replaced, wherever there is room.

    Fewer than ``share.n_workers`` are at work while the cluster has no room for all of them.
    """

    folder: Path
    share: RayShare
    n_threads: int
    plugins: tuple[str, ...] = ()
    target: str = TARGET
    patience_s: float = STALL_PATIENCE_S
    _slots: dict[int, _Slot] = field(default_factory=dict)
    _failed_starts: int = 0
    _interrupted: bool = False

    def __post_init__(self) -> None:
        for number in range(self.share.n_workers):
            self._start(number)

    @property
    def n_workers(self) -> int:
        return self.share.n_workers

    @property
    def n_free(self) -> int:
        return 0 if self._interrupted else sum(slot.free for slot in self._slots.values())

    @property
    def busy(self) -> frozenset[str]:
        return frozenset(slot.key for slot in self._slots.values() if slot.key is not None)

    def submit(self, job: Job) -> None:
        slot = next(slot for slot in self._slots.values() if slot.free)
        slot.key, slot.free = job.key, False
        slot.ask(slot.station.run.remote(job))

    def poll(self, timeout_s: float) -> list[ExecutorEvent]:
        import ray

        asked = {slot.answer: number for number, slot in self._slots.items() if slot.answer is not None}
        if not asked:
            time.sleep(timeout_s)
            return []
        ray.wait(list(asked), timeout=timeout_s, fetch_local=False)
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
        found = [event for answer in answered for event in self._take(asked[answer])]
        self._end_stuck()
        return found

    def interrupt(self) -> None:
        self._interrupted = True
        for slot in self._slots.values():
            if slot.key is not None:
                slot.station.interrupt.remote()

    def close(self) -> None:
        import ray

        self._interrupted = True
        for slot in self._slots.values():
            ray.kill(slot.station)  # its worker dies with it
        self._slots.clear()

    def _start(self, number: int) -> None:
        import ray

        actor = ray.remote(num_cpus=self.share.n_cpus, num_gpus=self.share.n_gpus, max_restarts=0)(Station)
        station = actor.remote()
        options = {
            "folder": self.folder.resolve(),
            "n_threads": self.n_threads,
            "plugins": self.plugins,
            "target": self.target,
            "patience_s": self.patience_s,
            "environment": carried_environment(),
            "first": number,
        }
        self._slots[number] = slot = _Slot(station)
        slot.ask(station.open.remote(options))

    def _take(self, number: int) -> list[ExecutorEvent]:
        """What a station has answered, or that there is none any more."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        slot = self._slots[number]
        try:
            events, slot.free = ray.get(slot.answer)
        except RayTaskError as error:
            raise error.cause from None
        except (RayActorError, OutOfMemoryError) as error:
            return self._gone(number, str(error))
        slot.opened = True
        if slot.free:
            self._failed_starts = 0
        if any(isinstance(event, (Ended, Lost)) for event in events):
            slot.key = None
        idle = slot.free and slot.key is None
        slot.ask(None if idle else slot.station.listen.remote())
        return events

    def _gone(self, number: int, error: str) -> list[ExecutorEvent]:
        import ray

        slot = self._slots.pop(number)
        with contextlib.suppress(ValueError):
            ray.kill(slot.station)
        if not slot.opened:
            self._failed_starts += 1
            if self._failed_starts >= MAX_KILLED_STARTS:
                raise UserError(f"workers can't start on Ray: {' '.join(error.split())[:300]}")
        if not self._interrupted:
            self._start(number)
        if slot.key is None:
            return []
        if slot.stuck:
            return [Lost(slot.key, number, f"no sign of life for {self.patience_s + STATION_GRACE_S:g} s")]
        if RAY_OUT_OF_MEMORY in error:
            return [Lost(slot.key, number, f"{OUT_OF_MEMORY}: Ray ended the worker")]
        return [Lost(slot.key, number, "its Ray worker was lost", from_outside=True)]

    def _end_stuck(self) -> None:
        """Give up stations that do not answer: their machine hangs, or nothing of it is to be reached."""
        import ray

        for slot in self._slots.values():
            silent_s = time.monotonic() - slot.asked_at
            if self.patience_s and slot.opened and slot.answer is not None:
                slot.stuck = slot.stuck or silent_s > self.patience_s + STATION_GRACE_S
                if slot.stuck:
                    ray.kill(slot.station)


def carried_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(CARRIED)}


@contextlib.contextmanager
def connected(address: str, log: Path) -> Iterator[list[dict[str, float]]]:
    """Ray for as long as it lasts; gives the resources of each machine of the cluster.

    ``auto``: the cluster that RAY_ADDRESS or an earlier ``ray start`` on this machine names, else one of this machine
    alone, which ends with this process. One that this process uses already stays. What Ray has to say goes to ``log``:
    it prints about every lost process, in the middle of whatever this one prints.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--ray: Ray is not installed; pip install 'mixlab[ray]'") from None

    with open(log, "a", encoding="utf-8") as said, contextlib.redirect_stdout(said):
        if ray.is_initialized():
            yield _machines(ray)
            return
        session = _connect(ray, address, log)
        reaper = _reaper(session) if session else None
        try:
            yield _machines(ray)
        finally:
            ray.shutdown()
            if reaper is not None:
                reaper.stdin.close()
                reaper.wait()


def _reaper(session: str) -> subprocess.Popen[bytes]:
    top = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-P", "-S", "-m", "sweeps.ray_reaper", str(os.getpid()), session]
    environment = {**os.environ, "PYTHONPATH": str(top)}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)


def _connect(ray: Any, address: str, log: Path) -> str:
    """Connect; return the session's folder where this has started a Ray of its own, else nothing."""
    _require_answer(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray takes over how this process answers SIGTERM, which is for the driver to say.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with output_to(log):  # Ray's C++ part warns on stderr as long as it can't connect
            context = ray.init(
                address=None if address == AUTO else address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(
            f"--ray {address}: no cluster can be reached there: {' '.join(str(error).split())}; this machine has to be "
            "part of it, with the same Ray, and RAY_AUTH_MODE=token set where the cluster asks for a token"
        ) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    session = str(getattr(context, "address_info", {}).get("session_dir", ""))
    return session if session.endswith(f"_{os.getpid()}") else ""  # its name ends with the process that started it


def _require_answer(address: str) -> None:
    """:class:`UserError` where nobody listens at ``address``: Ray itself would try for two minutes, deaf to signals."""
    place = f"--ray {address}"
    if address == AUTO:
        address = os.environ.get("RAY_ADDRESS", "")
        place = f"--ray {AUTO}: RAY_ADDRESS={address}"
        if address in ("", AUTO, "local"):
            return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise UserError(
            f"{place}: give auto or HOST:PORT, as `ray start` has printed it on the cluster's first machine"
        )
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"{place}: no cluster can be reached there: {error}") from None


def _machines(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
