"""What sweeping itself costs, measured with real drivers and workers: ``mixlab sweep bench``.

plan      seconds to plan 10,000 runs
engine    what a trial takes beside its training (a stand-in that takes no time), the driver's memory, and the whole
          command on the same sweep when it is finished
ray       the same through a Ray cluster of this machine: time to the first run, time per trial, memory of all processes
logging   share of a training's time that goes to MLflow, as runs record it
workers   trials per hour of N workers against one (on CUDA: of N on each GPU), after each has warmed up
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.records import read_sweep_runs
from sweeps.bench_driver import INSTANT, Taken

PARTS = ("plan", "engine", "ray", "logging", "workers")
LOOK_EVERY_S = 0.2
N_CELL_RUNS = 50  # of one arm and cell of the engine's sweep: 45 trials and 5 seeds
ENGINE = """
name = "engine"
question = "What does a sweep cost beside its trainings?"
experiment = "mqar"
seeds = [0, 1, 2, 3, 4]
[metric]
select = "select/accuracy"
report = "report/accuracy"
direction = "maximize"
[budget]
max_steps = 1
tune_trials = 45
[base]
"train.device" = "cpu"
[arms.full]
mixer = "softmax"
[arms.window]
mixer = "softmax(window=16)"
[tune]
"train.lr" = { log_uniform = [1e-4, 1e-1] }
"""
# The quickstart's size; no early stop, so that all trainings are equally long.
TRAININGS = """
name = "trainings"
question = "How many trainings an hour?"
experiment = "mqar"
seeds = [0]
[metric]
select = "select/accuracy"
report = "report/accuracy"
direction = "maximize"
[budget]
max_steps = 350
[base]
"train.device" = "cpu"
"train.eval_every" = 50
"train.stop" = { metric = "select/accuracy", threshold = 2.0 }
[arms.softmax]
mixer = "softmax(head_dim=48,qk_norm=true,rope=false)"
"""


@dataclass(frozen=True)
class Size:
    """How much is measured. ``rounds`` of trainings by every worker, after one that warms it up."""

    n_planned: int = 10_000
    n_trials: int = 1_000
    n_ray_trials: int = 100
    n_logged: int = 3
    n_steps: int = 350
    rounds: int = 2
    many: int = 2
    device: str = "cpu"


@dataclass(frozen=True)
class Row:
    """One measured number, beside what it should reach at these sizes; ``ok`` is None where nothing is asked."""

    part: str
    what: str
    value: float
    unit: str
    goal: str = ""
    ok: bool | None = None


def measure(parts: tuple[str, ...], size: Size, say: Callable[[str], None]) -> Iterator[Row]:
    """Rows, as they are measured; every part in a folder of its own, which is removed."""
    makers = {"plan": planning, "engine": engine, "ray": on_ray, "logging": logging, "workers": workers}
    for part in parts:
        say(f"{part} ...")
        with tempfile.TemporaryDirectory(prefix="mixlab-bench-") as folder:
            yield from makers[part](Path(folder), size)


def planning(folder: Path, size: Size) -> Iterator[Row]:
    from mixers import registry
    from sweeps.definition import load_sweep
    from sweeps.plan import plan

    path, n_cells = _write(folder, "engine", ENGINE), _n_cells(size.n_planned)
    sweep = load_sweep(str(path), _cells(n_cells))
    started = time.monotonic()
    registry.load_all()  # torch and all layers
    imported = time.monotonic()
    n_runs = plan(sweep).n_runs
    seconds = time.monotonic() - imported
    yield Row(
        "plan", f"planning {n_runs:,} runs", seconds, "s", "< 5 for 10,000", _at(size.n_planned, 10_000, seconds < 5)
    )
    yield Row("plan", "importing torch and the layers", imported - started, "s")


def engine(folder: Path, size: Size) -> Iterator[Row]:
    n_workers, overrides = _n_cores(), _cells(_n_cells(size.n_trials))
    options = {"overrides": overrides, "target": INSTANT, "tracked": False, "n_workers": n_workers}
    taken = drive(_write(folder, "engine", ENGINE), folder / "runs", **options)
    n = len(taken.ends_s)
    is_full = n >= 1_000
    ms = 1e3 * (taken.ends_s[-1] - taken.first_s) * taken.n_workers / n
    what = f"a worker's time per trial that takes none itself, {n:,} trials, {taken.n_workers} workers"
    yield Row("engine", what, ms, "ms", "<= 30 at 1,000", ms <= 30 if is_full else None)
    yield Row("engine", "the same, by the clock", ms / taken.n_workers, "ms")
    mib = taken.peak_bytes / 2**20
    yield Row("engine", "driver's largest memory", mib, "MiB", "<= 286 (300 MB) at 1,000", _at(n, 1_000, mib <= 286))
    again = time.monotonic()
    drive(folder / "engine.toml", folder / "runs", **options)
    seconds = time.monotonic() - again
    yield Row(
        "engine",
        f"the finished sweep of {n:,} runs once more",
        seconds,
        "s",
        "< 5 at 1,000",
        _at(n, 1_000, seconds < 5),
    )


def on_ray(folder: Path, size: Size) -> Iterator[Row]:
    overrides = _cells(_n_cells(size.n_ray_trials))
    options = {"overrides": overrides, "target": INSTANT, "tracked": False, "n_workers": _n_cores()}
    found = {}
    for name, where in (("local processes", {}), ("Ray", {"ray": "auto"})):
        with memory_of_children() as most:
            started = time.monotonic()
            taken = drive(_write(folder, "engine", ENGINE), folder / f"runs-{len(where)}", **options, **where)
            wall_s = time.monotonic() - started
        per_trial = 1e3 * (taken.ends_s[-1] - taken.first_s) / len(taken.ends_s)
        found[name] = (wall_s, taken.first_s, per_trial, most[0] / 2**20)
        yield Row("ray", f"{name}: whole command, {len(taken.ends_s)} trials", wall_s, "s")
        yield Row("ray", f"{name}: to the first run", taken.first_s, "s")
        yield Row("ray", f"{name}: per trial, by the clock", per_trial, "ms")
        yield Row("ray", f"{name}: memory of all processes", most[0] / 2**20, "MiB")
    local, ray = found.values()
    yield Row("ray", "Ray adds", ray[0] - local[0], "s")
    yield Row("ray", "Ray adds", ray[3] - local[3], "MiB")


def logging(folder: Path, size: Size) -> Iterator[Row]:
    overrides = {"seeds": list(range(size.n_logged)), "budget.max_steps": size.n_steps}
    drive(_write(folder, "trainings", TRAININGS), folder / "runs", overrides=overrides, n_workers=1)
    costs = [record.outcome.cost for record in read_sweep_runs(folder / "runs", "trainings")]
    share = statistics.median(100 * cost["tracking_s"] / cost["train_s"] for cost in costs)
    train_s = statistics.median(cost["train_s"] for cost in costs)
    what = f"MLflow's share of a training of {train_s:.1f} s, SQLite, median of {len(costs)}"
    yield Row("logging", what, share, "%", "< 2", share < 2)


def workers(folder: Path, size: Size) -> Iterator[Row]:
    """Rate in the steady state: from the moment that every worker has ended its first training."""
    path, is_cuda = _write(folder, "trainings", TRAININGS), size.device == "cuda"
    rates = []
    for n in (1, size.many):
        n_runs = n * (1 + size.rounds)
        overrides = {"seeds": list(range(n_runs)), "budget.max_steps": size.n_steps, "base.train.device": size.device}
        where = {"gpus": (_first_gpu(),), "per_gpu": n} if is_cuda else {"n_workers": n}
        taken = drive(path, folder / f"runs-{n}", overrides=overrides, tracked=False, **where)
        if taken.outcomes != {"finished": n_runs}:
            raise UserError(f"bench: trainings did not end well: {taken.outcomes}; see mixlab doctor")
        rates.append(3600 * (n_runs - n) / (taken.ends_s[-1] - taken.ends_s[n - 1]))
        at_a_time = f"{n} at a time on one GPU" if is_cuda else f"{n} worker{'s' if n > 1 else ''}"
        yield Row("workers", f"trainings of {size.n_steps} steps per hour, {at_a_time}", rates[-1], "")
        yield Row("workers", f"whole command, {n_runs} trainings, {at_a_time}", taken.wall_s, "s")
    goal, asked = ("x4 with 8", size.many >= 8) if is_cuda else ("x1.7 with 2 on 2 cores", _n_cores() >= size.many == 2)
    factor = rates[1] / rates[0]
    yield Row(
        "workers", f"{size.many} against one", factor, "x", goal, factor >= (4 if is_cuda else 1.7) if asked else None
    )


def drive(sweep: Path, runs: Path, **options: Any) -> Taken:
    """One driver in a process of its own, to its end."""
    words = json.dumps({"sweep": str(sweep), "runs": str(runs), **options})
    top = Path(__file__).resolve().parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(top), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-P", "-m", "sweeps.bench_driver", words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise UserError(f"bench: the driver ended with {done.returncode}: {lines[-1]}")
    return Taken(**json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def memory_of_children() -> Iterator[list[int]]:
    """The most memory of this process's descendants at a time, shared pages counted once; 0 without /proc."""
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_EVERY_S):
            most[0] = max(most[0], sum(_own_bytes(pid) for pid in _descendants(os.getpid())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


def _descendants(pid: int) -> set[int]:
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    found, before = {pid}, set()
    while found != before:
        before = set(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


def _own_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _n_cells(n_runs: int) -> int:
    return max(1, n_runs // (2 * N_CELL_RUNS))


def _cells(n: int) -> dict[str, Any]:
    return {"vary": {"train.batch_size": list(range(1, n + 1))}}


def _at(n: int, wanted: int, reached: bool) -> bool | None:
    """Goals hold for a size."""
    return reached if n >= wanted else None


def _first_gpu() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def _n_cores() -> int:
    from sweeps.resources import n_cores

    return n_cores()
