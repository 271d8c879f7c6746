"""Where a sweep stands, from sweep.json and the records alone: works while it runs, afterwards, and elsewhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.config import flatten
from experiments.errors import UserError
from experiments.records import FINAL_OUTCOMES, RunRecord, finite, read_run, run_folder
from sweeps.lock import driver_runs
from sweeps.saved import SavedRun, SavedSweep, read_saved


@dataclass(frozen=True)
class Failure:
    """A run that did not give numbers, and why."""

    key: str
    arm: str
    cell: str
    role: str
    seed: int
    outcome: str
    reason: str


@dataclass(frozen=True)
class TrialStatus:
    """A tuning trial that has been started. ``outcome`` is "" while it has none; ``value`` is its select metric."""

    trial: int
    key: str
    settings: dict[str, Any]
    outcome: str
    value: float | None


@dataclass(frozen=True)
class ArmCellStatus:
    """Runs of one arm-cell by state. ``missing``: planned, not running, and without a final outcome.

    ``best_select`` is over tuning trials (over replicates where nothing is tuned), ``mean_report`` over replicates;
    both over finished runs only.
    ``not_run`` says why replicates will not be run. ``front``: the Pareto front of a search with objectives, once it is
    over.
    """

    arm: str
    cell: str
    n_runs: int
    n_finished: int
    n_running: int
    n_diverged: int
    n_failed: int
    n_pruned: int
    n_missing: int
    best_select: float | None
    mean_report: float | None
    settings: dict[str, Any] | None
    not_run: str = ""
    trials: list[TrialStatus] = field(default_factory=list)
    front: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class SweepStatus:
    name: str
    question: str
    driver_runs: bool
    select: str
    report: str
    arm_cells: list[ArmCellStatus] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @property
    def n_runs(self) -> int:
        return sum(row.n_runs for row in self.arm_cells)

    @property
    def n_missing(self) -> int:
        return sum(row.n_missing + row.n_running for row in self.arm_cells)

    def to_json(self) -> dict[str, Any]:
        from dataclasses import asdict

        return finite({**asdict(self), "n_runs": self.n_runs, "n_missing": self.n_missing})


def sweep_status(runs: Path, name: str) -> SweepStatus:
    """The status of the sweep ``name`` under ``runs``; an unknown one is a :class:`UserError`."""
    saved = read_saved(runs, name)
    records = {run.key: read_run(run_folder(runs, name, run.key)) for run in saved.runs}
    drives = driver_runs(runs / name)
    by_arm_cell: dict[tuple[str, str], list[SavedRun]] = {}
    for run in saved.runs:
        by_arm_cell.setdefault((run.arm, run.cell), []).append(run)
    rows = [
        _row(saved, arm, cell, by_arm_cell.get((arm, cell), []), records, drives)
        for cell in saved.cells
        for arm in saved.arms
    ]
    failures = [
        Failure(run.key, run.arm, run.cell, run.role, run.seed, record.outcome.outcome, record.outcome.reason)
        for run in saved.runs
        if (record := records[run.key]) and record.outcome and record.outcome.outcome in ("failed", "diverged")
    ]
    return SweepStatus(
        saved.name, saved.question, drives, saved.metric["select"], saved.metric["report"], rows, failures
    )


def saved_name(runs: Path, name_or_path: str) -> str:
    """The name that a sweep is filed under, for its name, its file or its shipped definition."""
    from experiments.config import read_toml
    from sweeps.definition import definition_names, find_definition

    if (runs / name_or_path / "sweep.json").is_file():
        return name_or_path
    if Path(name_or_path).suffix == ".toml" or name_or_path in definition_names():
        path = find_definition(name_or_path)
        name = read_toml(path).get("name")
        if not isinstance(name, str):
            raise UserError(f"{path}: name: required, but not given")
        return name
    return name_or_path


def _row(
    saved: SavedSweep, arm: str, cell: str, planned: list[SavedRun], records: dict[str, RunRecord | None], drives: bool
) -> ArmCellStatus:
    choice = saved.chosen.get(f"{arm} | {cell}")
    not_run = choice["reason"] if choice and choice["settings"] is None else ""
    n_trials = saved.budget.get("tune_trials", 0)
    if choice:
        n_trials = sum(run.trial is not None for run in planned)  # fewer, where a sampler proposed settings twice
    n_runs = n_trials + (0 if not_run else len(saved.seeds))
    outcomes: Counter[str] = Counter()
    select: list[float] = []
    report: list[float] = []
    for run in planned:
        record = records[run.key]
        outcome = record.outcome if record else None
        if outcome is None or outcome.outcome not in FINAL_OUTCOMES:
            outcomes["running"] += bool(drives and record and outcome is None)
            continue
        outcomes[outcome.outcome] += 1
        if outcome.outcome != "finished":
            continue
        for name, values, wanted in (
            (saved.metric["select"], select, run.trial is not None or not saved.tune),
            (saved.metric["report"], report, run.trial is None),
        ):
            if wanted and (value := outcome.metrics.get(name)) is not None:
                values.append(value)
    n_ended = sum(outcomes[outcome] for outcome in FINAL_OUTCOMES)
    best = max if saved.metric["direction"] == "maximize" else min
    return ArmCellStatus(
        arm=arm,
        cell=cell,
        n_runs=n_runs,
        n_finished=outcomes["finished"],
        n_running=outcomes["running"],
        n_diverged=outcomes["diverged"],
        n_failed=outcomes["failed"],
        n_pruned=outcomes["pruned"],
        n_missing=n_runs - n_ended - outcomes["running"],
        best_select=best(select) if select else None,
        mean_report=sum(report) / len(report) if report else None,
        settings=choice["settings"] if choice else None,
        not_run=not_run,
        front=choice.get("front", []) if choice else [],
        trials=[
            _trial(saved, run, record) for run in planned if run.trial is not None and (record := records[run.key])
        ],
    )


def _trial(saved: SavedSweep, run: SavedRun, record: RunRecord) -> TrialStatus:
    settings, outcome = flatten(record.config), record.outcome
    return TrialStatus(
        trial=run.trial,
        key=run.key,
        settings={path: settings.get(path) for path in saved.tune},
        outcome=outcome.outcome if outcome else "",
        value=outcome.metrics.get(saved.metric["select"]) if outcome else None,
    )
