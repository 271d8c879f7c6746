"""What sweeping itself costs, measured with real drivers and workers: ``mixlab sweep bench``.

plan      seconds to plan 10,000 runs
engine    what a trial takes beside its training (a stand-in that takes no time), the driver's memory, and the whole
          command on the same sweep when it is finished
tracked   the same with MLflow: the driver's memory while the workers log, the finished sweep once more, and the
          driver's memory where nobody has logged and it has MLflow catch up
ray       the same through a Ray cluster of this machine: time to the first run, time per trial, memory of all processes
logging   share of a training's time that goes to MLflow, as runs record it
workers   the same sweep with one worker and with N, from the command to its end; on CUDA trials per hour of N on one
          GPU against one, after each has warmed up
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.records import read_sweep_runs
from experiments.tracking import unsynced
from sweeps.bench_driver import INSTANT, Taken

PARTS = ("plan", "engine", "tracked", "ray", "logging", "workers")
SLOW_PARTS = ("tracked", "ray")  # measured where they are asked for
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
# One cell of the quickstart: five arms, some of which take five times as long as others.
ONE_CELL = {"vary": {"task.n_pairs": [4]}, "base.train.device": "cpu"}
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
    """How much is measured. ``rounds`` of trainings by every worker of a GPU, after one that warms it up; ``repeats``
    of the sweep that one worker and many run in turn, with ``n_sweep_steps`` in each of its trainings."""

    n_planned: int = 10_000
    n_trials: int = 1_000
    n_ray_trials: int = 100
    n_logged: int = 3
    n_steps: int = 350
    rounds: int = 2
    repeats: int = 1
    n_sweep_steps: int = 100
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
    makers = {"plan": planning, "engine": engine, "tracked": tracked, "ray": on_ray}
    makers |= {"logging": logging, "workers": workers}
    for part in parts:
        say(f"{part} ...")
        with tempfile.TemporaryDirectory(prefix="mixlab-bench-") as folder:
            yield from makers[part](Path(folder), size)


def planning(folder: Path, size: Size) -> Iterator[Row]:
    started = time.monotonic()
    from mixers import registry
    from sweeps.definition import load_sweep
    from sweeps.plan import plan

    registry.load_all()  # torch and all layers
    seconds_to_import = time.monotonic() - started
    path, n_cells = _write(folder, "engine", ENGINE), _n_cells(size.n_planned)
    sweep = load_sweep(str(path), _cells(n_cells))
    started = time.monotonic()
    n_runs = plan(sweep).n_runs
    seconds = time.monotonic() - started
    yield Row(
        "plan", f"planning {n_runs:,} runs", seconds, "s", "< 5 for 10,000", _at(size.n_planned, 10_000, seconds < 5)
    )
    yield Row("plan", "importing torch and the layers", seconds_to_import, "s")


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
    yield memory_row("engine", f"driver's largest memory, {n:,} trials", taken)
    yield once_more("engine", folder, n, options)


def tracked(folder: Path, size: Size) -> Iterator[Row]:
    overrides = _cells(_n_cells(size.n_trials))
    options = {"overrides": overrides, "target": INSTANT, "tracked": True, "n_workers": _n_cores()}
    taken = drive(_write(folder, "engine", ENGINE), folder / "runs", **options)
    n = len(taken.ends_s)
    yield memory_row("tracked", f"driver's largest memory, {n:,} trials that log to MLflow", taken)
    yield once_more("tracked", folder, n, options)
    (folder / "runs" / "mlflow.db").unlink()
    for record in read_sweep_runs(folder / "runs", "engine"):
        unsynced.mark(record.folder, "the store was out of reach")
    taken = drive(folder / "engine.toml", folder / "runs", **options)
    yield memory_row("tracked", f"driver's largest memory, MLflow catching up on {n:,} trials", taken)
    yield Row("tracked", "whole command, catching up included", taken.wall_s, "s")


def memory_row(part: str, what: str, taken: Taken) -> Row:
    mib = taken.peak_bytes / 2**20
    n = sum(taken.outcomes.values())
    return Row(part, what, mib, "MiB", "<= 286 (300 MB) at 1,000", _at(n, 1_000, mib <= 286))


def once_more(part: str, folder: Path, n: int, options: dict[str, Any]) -> Row:
    """The whole command on a sweep that is finished."""
    seconds = drive(folder / "engine.toml", folder / "runs", **options).wall_s
    what = f"the finished sweep of {n:,} runs once more"
    return Row(part, what, seconds, "s", "< 5 at 1,000", _at(n, 1_000, seconds < 5))


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
    yield from (workers_of_a_gpu if size.device == "cuda" else workers_of_cores)(folder, size)


def workers_of_cores(folder: Path, size: Size) -> Iterator[Row]:
    """Whole commands, start and last run included, in turn: what else the machine does falls on both."""
    counts = (1, size.many)
    overrides = {**ONE_CELL, "budget.max_steps": size.n_sweep_steps}
    taken: dict[int, list[Taken]] = {n: [] for n in counts}
    found = []
    for turn in range(size.repeats):
        for n in counts if turn % 2 == 0 else reversed(counts):
            runs = folder / f"runs-{n}-{turn}"
            taken[n].append(drive("quickstart", runs, overrides=overrides, tracked=False, n_workers=n))
            found.append(
                {record.identity.key: record.outcome.metrics for record in read_sweep_runs(runs, "quickstart")}
            )
    n_runs = len(found[0])
    medians, trained_s = {}, {}
    for n, those in taken.items():
        named = f"{n} worker{'s' if n > 1 else ''}"
        medians[n] = statistics.median(one.wall_s for one in those)
        first_s = statistics.median(one.first_s for one in those)
        trained_s[n] = medians[n] - first_s
        yield Row(
            "workers",
            f"whole command, {n_runs} trainings of at most {size.n_sweep_steps} steps, {named}",
            medians[n],
            "s",
        )
        yield Row("workers", f"of it to the first training: imports, plan, start of workers, {named}", first_s, "s")
        tail_s = statistics.median(one.wall_s - one.ends_s[-n] for one in those)
        yield Row("workers", f"of it with a worker out of work, at the end, {named}", tail_s, "s")
        computed_s = statistics.median(one.processor_s for one in those)
        yield Row("workers", f"time on processors, {named}", computed_s, "s")
    factor, asked = medians[1] / medians[size.many], _n_cores() >= size.many == 2
    goal = "x1.7 with 2 on 2 cores"
    yield Row("workers", f"{size.many} against one", factor, "x", goal, factor >= 1.7 if asked else None)
    factor = trained_s[1] / trained_s[size.many]
    yield Row("workers", "the same from the first training on, as in a long sweep", factor, "x")
    n_other = sum(one.get(key) != metrics for one in found for key, metrics in found[0].items())
    yield Row("workers", "results that differ, of all but the first sweep", n_other, "", "0", n_other == 0)


def workers_of_a_gpu(folder: Path, size: Size) -> Iterator[Row]:
    """Rate in the steady state: from the moment that every worker has ended its first training."""
    path, rates = _write(folder, "trainings", TRAININGS), []
    for n in (1, size.many):
        n_runs = n * (1 + size.rounds)
        overrides = {"seeds": list(range(n_runs)), "budget.max_steps": size.n_steps, "base.train.device": "cuda"}
        where = {"gpus": (_first_gpu(),), "per_gpu": n}
        taken = drive(path, folder / f"runs-{n}", overrides=overrides, tracked=False, **where)
        if taken.outcomes != {"finished": n_runs}:
            raise UserError(f"bench: trainings did not end well: {taken.outcomes}; see mixlab doctor")
        rates.append(3600 * (n_runs - n) / (taken.ends_s[-1] - taken.ends_s[n - 1]))
        at_a_time = f"{n} at a time on one GPU"
        yield Row("workers", f"trainings of {size.n_steps} steps per hour, {at_a_time}", rates[-1], "")
        yield Row("workers", f"whole command, {n_runs} trainings, {at_a_time}", taken.wall_s, "s")
    factor = rates[1] / rates[0]
    reached = factor >= 4 if size.many >= 8 else None
    yield Row("workers", f"{size.many} against one", factor, "x", "x4 with 8", reached)


def drive(sweep: Path | str, runs: Path, **options: Any) -> Taken:
    """One driver in a process of its own, to its end."""
    begun, computed_s = time.monotonic(), _processor_s_of_children()
    words = json.dumps({"sweep": str(sweep), "runs": str(runs), "begun": begun, **options})
    top = Path(__file__).resolve().parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(top), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    environment.pop("MLFLOW_TRACKING_URI", None)  # the store is a file beside the records, and goes with them
    command = [sys.executable, "-P", "-m", "sweeps.bench_driver", words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise UserError(f"bench: the driver ended with {done.returncode}: {lines[-1]}")
    taken = Taken(**json.loads(done.stdout.splitlines()[-1]))
    return replace(taken, wall_s=time.monotonic() - begun, processor_s=_processor_s_of_children() - computed_s)


def _processor_s_of_children() -> float:
    """Of processes that have ended, their own children included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
