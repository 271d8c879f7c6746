"""The faults. Each function disturbs the sweep in its sandbox, brings it to its end, and returns what it has to say.

``AssertionError`` says that the sweep did not do what it has to. A new fault is one more function in ``FAULTS``.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from experiments.records import n_attempts, read_json, read_outcome
from tests.chaos.sandbox import NAME, SWEEP, Sandbox

HERE = Path(__file__).parent
UNTRACKED = ("--no-tracking",)
# Two arms in two cells, nine trials and six seeds each.
SIXTY = SWEEP.replace("[tune]", '[vary]\n"task.n_pairs" = [2, 4]\n[tune]')
SIXTY = SIXTY.replace("seeds = [0, 1]", "seeds = [0, 1, 2, 3, 4, 5]").replace("tune_trials = 2", "tune_trials = 9")
END_WITHIN_S = 5.0
# The first run of a worker is silent for seconds while its libraries warm up, longer beside other processes.
STALL_S = 20
LOCKED_S = 30.0


class Skipped(Exception):
    """The fault can't be made on this machine; says why."""


def kills(sandbox: Sandbox) -> None:
    """38 workers, 6 drivers and 6 times both at once, at random moments, starts and ends included."""
    storm(sandbox, ["worker"] * 38 + ["driver"] * 6 + ["both"] * 6)


def tracked_kills(sandbox: Sandbox) -> None:
    """The same with the records mirrored to MLflow."""
    storm(sandbox, ["worker"] * 2 + ["driver"] + ["both"])


def storm(sandbox: Sandbox, victims: list[str]) -> None:
    sandbox.random.shuffle(victims)
    sandbox.start()
    for victim in victims:
        at_work = sandbox.random.random() < 0.8  # else while things are starting, or whenever it may be
        if at_work:
            sandbox.wait_event("run_started")
        delay_s = sandbox.random.uniform(0, 1.2 if at_work else 4.0)
        deadline = time.monotonic() + delay_s
        while time.monotonic() < deadline and not sandbox.driver.ended:
            time.sleep(0.01)
        if sandbox.driver.ended:
            raise AssertionError(f"the sweep ended after {len(sandbox.faults_at)} kills: {sandbox.errors()[-300:]}")
        if victim == "worker":
            sandbox.wait(lambda: bool(sandbox.workers()), "worker")
            sandbox.kill_worker()
            continue
        sandbox.kill_driver() if victim == "driver" else sandbox.kill_both()
        sandbox.start()
    if (code := sandbox.finish()) != 0:
        raise AssertionError(f"the sweep ended with {code}: {sandbox.errors()[-500:]}")


def ended_in_order(sandbox: Sandbox, *signals: int) -> None:
    """Signals to a driver at work: it ends in time, with 130, and takes its workers along."""
    sandbox.start()
    sandbox.wait_event("run_progress", 3)
    started = time.monotonic()
    for number in signals:
        sandbox.signal(sandbox.driver.process.pid, number)
        time.sleep(0.3)
    code, seconds = sandbox.finish(), time.monotonic() - started
    if code != 130:
        raise AssertionError(f"exit code {code} instead of 130: {sandbox.errors()[-300:]}")
    if left := sandbox.processes():
        raise AssertionError(f"{len(left)} processes outlive their driver")
    # Under a load of other processes the five seconds are not to be had: the bound leaves them some air.
    if seconds > 2 * END_WITHIN_S:
        raise AssertionError(f"it took {seconds:.1f} s to end")
    sandbox.restart_and_finish()


def sigterm(sandbox: Sandbox) -> None:
    """SIGTERM of the driver."""
    ended_in_order(sandbox, signal.SIGTERM)


def ctrl_c(sandbox: Sandbox) -> None:
    """Ctrl-C once."""
    ended_in_order(sandbox, signal.SIGINT)


def ctrl_c_twice(sandbox: Sandbox) -> None:
    """Ctrl-C twice, the second one while trainings are saved."""
    ended_in_order(sandbox, signal.SIGINT, signal.SIGINT)


def hang(sandbox: Sandbox) -> None:
    """A worker that is stopped in a run, for longer than --stall-after."""
    sandbox.start()
    sandbox.wait_event("run_progress", 2)
    # One of two may be between two runs: both are stopped, so that at least one hangs in a run.
    for pid in sandbox.workers():
        sandbox.signal(pid, signal.SIGSTOP)
    sandbox.wait_event("run_retried")
    if (code := sandbox.finish()) != 0:
        raise AssertionError(f"the sweep ended with {code}: {sandbox.errors()[-500:]}")


def suspend(sandbox: Sandbox) -> None:
    """A driver that is stopped for longer than --stall-after: its workers were at work all the time."""
    sandbox.start()
    sandbox.wait_event("run_progress", 2)
    sandbox.signal(sandbox.driver.process.pid, signal.SIGSTOP)
    time.sleep(STALL_S + 2)
    os.kill(sandbox.driver.process.pid, signal.SIGCONT)
    if (code := sandbox.finish()) != 0:
        raise AssertionError(f"the sweep ended with {code}: {sandbox.errors()[-500:]}")


def memory(sandbox: Sandbox) -> None:
    """An arm that takes memory until there is none: recorded as that, after one more try alone."""
    sandbox.fault()
    sandbox.start()
    if (code := sandbox.finish()) != 1:
        raise AssertionError(f"exit code {code} instead of 1 for failed runs: {sandbox.errors()[-500:]}")
    records = [folder for folder in (sandbox.runs / NAME).iterdir() if (folder / "run.json").exists()]
    hungry = [folder for folder in records if read_json(folder / "run.json")["arm"] == "hungry"]
    ends = [(read_outcome(folder).reason[:13], n_attempts(folder)) for folder in hungry]
    if ends != [("out of memory", 2)] * 2:
        raise AssertionError(f"reasons and attempts: {ends}")


def broken_plugin(sandbox: Sandbox) -> None:
    """A plugin that raises in the worker only, then is mended."""
    sandbox.flag.touch()
    sandbox.fault()
    sandbox.start()
    code = sandbox.finish()
    if code != 2 or "workers can't start" not in sandbox.errors() or len(sandbox.errors().splitlines()) != 1:
        raise AssertionError(f"exit code {code}, said: {sandbox.errors()[-500:]}")
    sandbox.flag.unlink()
    sandbox.faults_at[-1] = time.monotonic()  # before that, nothing could recover
    sandbox.restart_and_finish()


def torn_records(sandbox: Sandbox) -> None:
    """Both killed; the journal, an unfinished run's metrics and a finished run's outcome torn in their last lines."""
    sandbox.start()
    sandbox.wait_event("run_ended", 3)
    sandbox.wait_event("run_progress", 1)
    sandbox.kill_both()
    folders = [folder for folder in (sandbox.runs / NAME).iterdir() if folder.is_dir()]
    finished = next(folder for folder in folders if read_outcome(folder) is not None)
    under_way = [folder for folder in folders if (folder / "metrics.jsonl").exists() and read_outcome(folder) is None]
    sandbox.redone.add(finished.name)
    torn = [sandbox.runs / NAME / "optuna.journal", finished / "outcome.json", finished / "metrics.jsonl"]
    for path in [*torn, *(folder / "metrics.jsonl" for folder in under_way)]:
        if path.stat().st_size:
            tear(path)
            sandbox.fault()
    sandbox.restart_and_finish()


def tear(path: Path) -> None:
    """Cut a file in the middle of its last line; JSON over many lines, anywhere in the middle."""
    content = path.read_bytes()
    last = 0 if path.suffix == ".json" else content.rstrip(b"\n").rfind(b"\n") + 1
    os.truncate(path, last + (len(content) - last) // 2)


def two_drivers(sandbox: Sandbox) -> None:
    """A second driver while the first is at work: refused with one line."""
    first = sandbox.start()
    sandbox.wait_event("run_started")
    sandbox.fault()
    # So small a sweep may be over before a second driver has imported everything: the first one waits for it.
    os.kill(first.process.pid, signal.SIGSTOP)
    sandbox.start()
    code = sandbox.finish()
    os.kill(first.process.pid, signal.SIGCONT)
    said = sandbox.errors()
    if code != 2 or len(said.splitlines()) != 1 or f"process {first.process.pid}" not in said:
        raise AssertionError(f"the second driver ended with {code}: {said[-500:]}")
    if (code := sandbox.finish(first)) != 0:
        raise AssertionError(f"the first driver ended with {code}: {sandbox.errors(0)[-500:]}")


def clock_back(sandbox: Sandbox) -> None:
    """The clock of all processes set back by an hour in the middle, then both killed."""
    sandbox.start()
    sandbox.wait_event("run_ended", 2)
    sandbox.flag.touch()
    sandbox.fault()
    sandbox.wait_event("run_ended", 3)
    sandbox.kill_both()
    sandbox.restart_and_finish()


def disk_full(sandbox: Sandbox) -> None:
    """No space left on the device of the records, in the middle; then there is some again."""
    sandbox.runs.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "chaos", sandbox.runs], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        raise Skipped("a small file system of its own can't be mounted without root") from None
    try:
        sandbox.start()
        sandbox.wait_event("run_ended", 2)
        ballast = sandbox.runs / "ballast"
        with open(ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError:
                sandbox.fault()
        code = sandbox.finish()
        if code != 2 or "No space left on device" not in sandbox.errors() or len(sandbox.errors().splitlines()) != 1:
            raise AssertionError(f"exit code {code}, said: {sandbox.errors()[-800:]}")
        ballast.unlink()
        sandbox.faults_at[-1] = time.monotonic()  # before that, nothing could recover
        sandbox.restart_and_finish()
        shutil.copytree(sandbox.runs, sandbox.folder / "copy")
    finally:
        for pid in sandbox.processes():
            os.kill(pid, signal.SIGKILL)
        subprocess.run(["umount", "--lazy", sandbox.runs], check=True, capture_output=True)
    sandbox.runs = sandbox.folder / "copy"


def server_killed(sandbox: Sandbox) -> None:
    """MLflow's server killed while trainings log to it, then started again."""
    server = sandbox.server()
    sandbox.start()
    sandbox.wait_event("run_ended", 1)
    sandbox.wait_event("run_progress", 3)
    sandbox.fault()
    server.kill()
    sandbox.wait_event("run_ended", 4)
    server.start()
    if (code := sandbox.finish()) != 0:
        raise AssertionError(f"the sweep ended with {code}: {sandbox.errors()[-500:]}")
    sandbox.sync()


def store_locked(sandbox: Sandbox) -> None:
    """The SQLite store locked by another process for 30 s, from the first training on."""
    sandbox.start()
    sandbox.wait_event("run_progress", 1)
    with sqlite3.connect(sandbox.runs / "mlflow.db", timeout=60, isolation_level=None) as store:
        store.execute("BEGIN EXCLUSIVE")
        sandbox.fault()
        locked_until = time.monotonic() + LOCKED_S
        sandbox.wait_event("run_ended", 4)
        if time.monotonic() > locked_until:
            raise AssertionError("trainings waited for the store")
        time.sleep(max(0.0, locked_until - time.monotonic()))
        store.execute("ROLLBACK")
    store.close()
    if (code := sandbox.finish()) != 0:
        raise AssertionError(f"the sweep ended with {code}: {sandbox.errors()[-500:]}")
    sandbox.sync()


def ray_workers(sandbox: Sandbox) -> None:
    """On Ray: its processes that hold workers killed, then a worker, then the driver, which nothing outlives."""
    if importlib.util.find_spec("ray") is None:
        raise Skipped("Ray is not installed: pip install 'mixlab[ray]'")
    sandbox.start()
    sandbox.wait_event("run_progress", 1)
    for pid in sandbox.workers():  # one of two may still be starting: both, so that at least one loses a run
        sandbox.signal(parent_of(pid), signal.SIGKILL)
    sandbox.wait_event("run_retried", 1)
    sandbox.wait_event("run_ended", 2)
    sandbox.wait(lambda: bool(sandbox.workers()), "worker")
    sandbox.kill_worker()
    sandbox.wait_event("run_ended", 3)
    sandbox.kill_driver()
    sandbox.wait_gone(sandbox.processes, "processes")
    sandbox.restart_and_finish()


def ray_machine(sandbox: Sandbox) -> None:
    """A machine of a Ray cluster killed with all that runs on it; another joins; then the driver is killed."""
    if importlib.util.find_spec("ray") is None:
        raise Skipped("Ray is not installed: pip install 'mixlab[ray]'")
    cluster = sandbox.ray_cluster()
    cluster.start_head()
    joined = cluster.add_machine()
    sandbox.options = (*sandbox.options, "--ray", cluster.address)
    sandbox.start()
    sandbox.wait_event("run_progress", 1)
    sandbox.wait(lambda: len(sandbox.workers()) == 2, "worker on each machine")
    sandbox.wait_event("run_ended", 1)
    sandbox.fault()
    cluster.kill_machine(joined)
    cluster.add_machine()
    sandbox.wait(lambda: len(sandbox.workers()) == 2, "worker on the new machine")
    sandbox.kill_driver()
    sandbox.wait_gone(sandbox.workers, "workers")
    sandbox.restart_and_finish()
    cluster.stop()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@dataclass(frozen=True)
class Fault:
    """``n`` is how often it has to happen at least; ``sixty``: in the sweep of 60 runs, not in that of 8.

    One worker where a second would show nothing: most of the time goes to their imports of torch and MLflow.
    """

    make: Callable[[Sandbox], None]
    n: int = 1
    sixty: bool = False
    tracked: bool = False
    text: str = SWEEP
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    n_workers: int = 2

    def sandbox(self, seed: int, deadline: float) -> Sandbox:
        options = (*(() if self.tracked else UNTRACKED), *self.options)
        text = SIXTY if self.sixty else self.text
        return Sandbox(seed, text, options, {**self.environment}, self.n_workers, deadline)


HUNGRY = SWEEP.replace("[tune]", '[arms.hungry]\nmixer = "chaos_hungry"\n[tune]')
# The longest first: what is left at the end keeps all lanes busy.
FAULTS = {
    "kills": Fault(kills, n=50, sixty=True),
    "tracked_kills": Fault(tracked_kills, n=4, tracked=True),
    "ray_machine": Fault(ray_machine, n=2, sixty=True),
    "ctrl_c": Fault(ctrl_c, tracked=True),
    "clock_back": Fault(clock_back, n=2, tracked=True, environment={"PYTHONPATH": str(HERE / "clock")}, n_workers=1),
    "server_killed": Fault(server_killed, tracked=True, n_workers=1),
    "store_locked": Fault(store_locked, tracked=True),
    "ray_workers": Fault(ray_workers, n=3, options=("--ray", "auto")),
    "suspend": Fault(suspend, options=("--stall-after", str(STALL_S)), n_workers=1),
    "hang": Fault(hang, options=("--stall-after", str(STALL_S))),
    "memory": Fault(memory, text=HUNGRY, options=("--plugin", str(HERE / "hungry.py"))),
    "disk_full": Fault(disk_full, n_workers=1),
    "broken_plugin": Fault(broken_plugin, options=("--plugin", str(HERE / "broken.py")), n_workers=1),
    "ctrl_c_twice": Fault(ctrl_c_twice, n=2),
    "torn_records": Fault(torn_records, n=3, n_workers=1),
    "sigterm": Fault(sigterm, n_workers=1),
    "two_drivers": Fault(two_drivers, n_workers=1),
}
