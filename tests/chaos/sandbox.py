"""A sweep of real trainings in a folder of its own, and everything that can be done to its processes."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.ray_cluster import RayCluster
from tests.stores import MlflowServer

TOP = Path(__file__).parent.parent.parent
NAME = "chaos"
MARK = "MIXLAB_CHAOS"
# With three faults at a time on two slow cores a driver may take minutes to come to its first run.
PATIENCE_S = 300.0
SWEEP = """
name = "chaos"
question = "Does a sweep survive?"
seeds = [0, 1]

[base.model]
d_model = 16
n_layers = 1
[base.task]
name = "mqar"
vocab_size = 64
seq_len = 32
n_pairs = 4
n_train = 512
n_select = 32
n_report = 32
[base.train]
device = "cpu"
batch_size = 16
log_every = 1
eval_every = 20
checkpoint_every_s = 0.05

[metric]
select = "select/accuracy"
report = "report/accuracy"
direction = "maximize"
[budget]
max_steps = 40
tune_trials = 2

[arms.softmax]
mixer = "softmax"
[arms.linear]
mixer = "linear_attention"
[tune]
"train.lr" = { log_uniform = [1e-3, 3e-2] }
"""


@dataclass
class Driver:
    """A ``mixlab sweep run`` and its events, each with the moment at which it came."""

    process: subprocess.Popen[str]
    started_at: float
    events: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    reader: threading.Thread | None = None

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def has(self, name: str, n: int = 1) -> bool:
        return sum(event["event"] == name for _, event in self.events) >= n

    def read(self) -> None:
        for line in self.process.stdout:
            self.events.append((time.monotonic(), json.loads(line)))


@dataclass
class Sandbox:
    """One folder, one sweep, one driver after the other. Its processes bear a mark that only they have."""

    seed: int = 0
    text: str = SWEEP
    options: tuple[str, ...] = ("--no-tracking",)
    environment: dict[str, str] = field(default_factory=dict)
    n_workers: int = 2
    deadline: float = math.inf
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="mixlab-chaos-")))
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    drivers: list[Driver] = field(default_factory=list)
    faults_at: list[float] = field(default_factory=list)
    redone: set[str] = field(default_factory=set)  # keys of results that a fault destroyed: they are made again
    runs: Path = field(init=False)
    _server: MlflowServer | None = None
    _cluster: RayCluster | None = None

    def __post_init__(self) -> None:
        self.runs = self.folder / "runs"
        self.random = random.Random(self.seed)
        self.sweep_file = self.folder / "chaos.toml"
        self.sweep_file.write_text(self.text, encoding="utf-8")
        self.flag = self.folder / "flag"

    @property
    def driver(self) -> Driver:
        return self.drivers[-1]

    def server(self) -> MlflowServer:
        """A tracking server for this sweep, ended with the sandbox."""
        folder = self.folder / "server"
        folder.mkdir()
        self._server = MlflowServer(folder)
        self._server.start()
        self.environment["MLFLOW_TRACKING_URI"] = self._server.uri
        return self._server

    def ray_cluster(self) -> RayCluster:
        """A Ray cluster for this sweep, ended with the sandbox."""
        self._cluster = RayCluster(self.ray_folder)
        self.environment |= self._cluster.environment
        return self._cluster

    def sync(self) -> None:
        """``mixlab sync``, as a user does whose store was away."""
        words = [sys.executable, "-m", "mixlab", "sync", NAME, "--runs", str(self.runs)]
        environment = {**os.environ, **self.environment}
        done = subprocess.run(words, cwd=TOP, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise AssertionError(f"mixlab sync ended with {done.returncode}: {done.stderr[-500:]}")

    def start(self) -> Driver:
        """One more driver; the sweep goes on."""
        errors = open(self.folder / f"errors-{len(self.drivers)}.txt", "w", encoding="utf-8")  # noqa: SIM115
        command = [sys.executable, "-m", "mixlab", "sweep", "run", str(self.sweep_file)]
        process = subprocess.Popen(
            [*command, "--runs", str(self.runs), "--workers", str(self.n_workers), "--json", *self.options],
            cwd=TOP,
            env={
                **os.environ,
                MARK: self.mark,
                "CHAOS_FLAG": str(self.flag),
                "RAY_TMPDIR": str(self.ray_folder),
                **self.environment,
            },
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        errors.close()
        driver = Driver(process, time.monotonic())
        driver.reader = threading.Thread(target=driver.read, daemon=True)
        driver.reader.start()
        self.drivers.append(driver)
        return driver

    def errors(self, number: int = -1) -> str:
        return (self.folder / f"errors-{number % len(self.drivers)}.txt").read_text(encoding="utf-8")

    def wait(self, condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        """Wait for something that the driver brings about; it may not end before."""
        deadline = min(self.deadline, time.monotonic() + patience_s)
        while not condition():
            ended = self.driver.ended
            if ended and not condition():
                raise AssertionError(f"the driver ended before {what}: {self.errors()[-500:]}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} within {patience_s:g} s")
            time.sleep(0.03)

    def wait_gone(self, find: Callable[[], list[int]], what: str, patience_s: float = 5.0) -> None:
        """Wait until there is none of a killed driver's processes any more."""
        deadline = time.monotonic() + patience_s
        while (left := find()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            raise AssertionError(f"{len(left)} {what} outlive their driver for {patience_s:g} s")

    def wait_event(self, name: str, n: int = 1) -> None:
        self.wait(lambda: self.driver.has(name, n), f"{name} {n}")

    def finish(self, driver: Driver | None = None, patience_s: float = PATIENCE_S) -> int:
        """Wait for the end of a driver, the last one or another; its exit code."""
        driver = driver or self.driver
        patience_s = min(patience_s, self.deadline - time.monotonic())
        try:
            code = driver.process.wait(max(0.0, patience_s))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver did not end within {patience_s:.0f} s") from None
        driver.reader.join(10)
        return code

    def restart_and_finish(self) -> None:
        """The same command once more: the sweep has to come to its end."""
        self.start()
        code = self.finish()
        if code != 0:
            raise AssertionError(f"the restarted sweep ended with {code}: {self.errors()[-500:]}")

    def workers(self) -> list[int]:
        return [pid for pid in self.processes() if b"sweeps.worker" in _read(pid, "cmdline")]

    def processes(self) -> list[int]:
        """All that live and bear the mark, whoever their parents are by now."""
        mark = f"{MARK}={self.mark}".encode()
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        marked = {pid for pid in found if mark in _read(pid, "environ").split(b"\0")}
        if "--ray" in self.options:  # its processes write their titles over their environment
            marked |= {pid for pid in found if _has_open(pid, str(self.ray_folder))}
        return [pid for pid in sorted(marked) if not _is_zombie(pid)]

    @property
    def ray_folder(self) -> Path:
        """Where Ray keeps sockets and logs: Unix allows their paths about a hundred characters."""
        return Path(tempfile.gettempdir()) / f"chaos-{self.mark[:8]}"

    def kill_worker(self) -> bool:
        """SIGKILL for a worker chosen at random; False where there is none."""
        workers = self.workers()
        return bool(workers) and self.signal(self.random.choice(workers), signal.SIGKILL)

    def kill_driver(self) -> None:
        self.signal(self.driver.process.pid, signal.SIGKILL)
        self.finish()

    def kill_both(self) -> None:
        workers = self.workers()
        self.signal(self.driver.process.pid, signal.SIGKILL)
        for pid in workers[:1]:
            _kill(pid, signal.SIGKILL)
        self.finish()

    def signal(self, pid: int, number: int) -> bool:
        self.faults_at.append(time.monotonic())
        return _kill(pid, number)

    def fault(self) -> None:
        """Note that a fault happens now."""
        self.faults_at.append(time.monotonic())

    def recover_s(self) -> list[float]:
        """From each fault to the next start of a run, where one came before the next fault."""
        starts = [at for d in self.drivers for at, e in d.events if e["event"] == "run_started"]
        found = []
        for at, following in itertools.pairwise([*self.faults_at, math.inf]):
            after = [start for start in starts if at < start <= following]
            found += [min(after) - at] if after else []
        return found

    def left_behind(self) -> int:
        """Processes that are still there a moment after the last driver ended. They are ended then."""
        deadline = time.monotonic() + 2
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            _kill(pid, signal.SIGKILL)
        return len(left)

    def remove(self) -> None:
        for driver in self.drivers:
            driver.process.kill()
            driver.process.wait()
            driver.reader.join(10)
            driver.process.stdout.close()
        if self._server is not None:
            self._server.kill()
        if self._cluster is not None:
            self._cluster.stop()
        shutil.rmtree(self.ray_folder, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _kill(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _has_open(pid: int, folder: str) -> bool:
    """Whether a process has a file or socket in ``folder`` open, or works there."""
    for link in (*Path(f"/proc/{pid}").glob("fd/*"), Path(f"/proc/{pid}/cwd")):
        try:
            if os.readlink(link).startswith(folder):
                return True
        except OSError:  # it has just ended, or closed it
            continue
    return False


def _is_zombie(pid: int) -> bool:
    return _read(pid, "stat").rpartition(b")")[2].split()[:1] in ([b"Z"], [])
