"""``python -m sweeps.bench_driver JSON``: one sweep in a process of its own, timed; what it took is its last line."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.config import ExperimentConfig
from experiments.progress import OnProgress, Progress
from experiments.records import RunIdentity, RunOutcome, run_folder, write_identity, write_outcome
from sweeps.definition import load_sweep
from sweeps.driver import run_sweep
from sweeps.events import Event, RunEnded, RunStarted
from sweeps.live import View

INSTANT = "sweeps.bench_driver:instant"


@dataclass
class Taken:
    """Seconds since the command began: first start of a run, and the ends of all; the driver's largest memory, and
    seconds on processors, workers included."""

    wall_s: float = 0.0
    first_s: float = 0.0
    ends_s: list[float] = field(default_factory=list)
    n_workers: int = 0
    peak_bytes: int = 0
    processor_s: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)


def instant(
    config: ExperimentConfig, identity: RunIdentity, runs: Path, *, tracking: Any, on_progress: OnProgress
) -> RunOutcome:
    """Stands for a training that takes no time: the same files, and made-up numbers that no table is made from.

    ``tracking``: a ``TrackingTarget``, to which it logs as a training does, or None.
    """
    folder = run_folder(runs, identity.sweep, identity.key)
    write_identity(folder, identity, config.resolved())
    tracker = None
    if tracking is not None:
        from experiments.tracking import RunTracker

        told = (tracking.uri, tracking.experiment_id, identity, config.resolved())
        tracker = RunTracker(*told, parent_id=tracking.parent_id or None, tags={})
        tracker.start()
    on_progress(Progress(1, 1, {"train/loss": 1.0}))
    metrics = {"select/accuracy": config.train.lr, "report/accuracy": config.train.lr}
    outcome = RunOutcome("finished", step=1, metrics=metrics)
    write_outcome(folder, outcome)
    if tracker is not None:
        tracker.finish(outcome, folder)
    return outcome


class Clock(View):
    """Notes when runs start and end."""

    def __init__(self, begun: float) -> None:
        self.begun, self.taken = begun, Taken()

    def show(self, event: Event) -> None:
        now = time.monotonic() - self.begun
        if isinstance(event, RunStarted):
            self.taken.first_s = self.taken.first_s or now
            self.taken.n_workers = max(self.taken.n_workers, event.worker + 1)
        elif isinstance(event, RunEnded) and event.worker is not None:
            self.taken.ends_s.append(now)


def peak_bytes() -> int:
    """The largest memory of this program; ``ru_maxrss`` counts that of its parent before it was started."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    options = json.loads(sys.argv[1])
    clock = Clock(options.pop("begun", time.monotonic()))  # one clock for all processes of a machine
    sweep = load_sweep(options.pop("sweep"), options.pop("overrides"))
    result = run_sweep(sweep, Path(options.pop("runs")), clock, **options)
    taken = clock.taken
    taken.wall_s, taken.outcomes = time.monotonic() - clock.begun, result.outcomes
    taken.peak_bytes = peak_bytes()
    print(json.dumps(asdict(taken)), flush=True)


if __name__ == "__main__":
    main()
