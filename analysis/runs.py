"""The runs of a sweep as rows, read from the records on disk or from MLflow: the same rows either way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config import flatten
from experiments.errors import UserError, nearest
from experiments.records import RunRecord, read_json, read_run, run_folder
from sweeps.saved import SavedRun, SavedSweep, read_saved

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run
    from mlflow.tracking import MlflowClient

UNFINISHED = "unfinished"  # the outcome of a run that has left none yet
METRIC_SPLITS = ("report/", "select/")


@dataclass(frozen=True)
class RunRow:
    """One run. ``metrics`` by full name (``report/accuracy``), ``cost`` without prefix, ``settings`` the flat config.

    ``outcome`` is one of experiments.records.Outcome or ``unfinished``; ``link`` is the MLflow run id, or "".
    Metrics and costs are finite or None. ``data_hash`` and ``order_hash`` are those of the data and of the training
    batches, "" where they are not known (MLflow keeps the former only).
    """

    arm: str
    cell: str
    factors: dict[str, Any]
    role: str
    seed: int
    outcome: str
    reason: str
    pattern: str
    metrics: dict[str, float | None]
    cost: dict[str, float | None]
    settings: dict[str, Any]
    link: str
    key: str
    data_hash: str = ""
    order_hash: str = ""


def rows_from_records(runs: Path, sweep: str) -> tuple[SavedSweep, list[RunRow]]:
    """The sweep's plan and a row for every run of it found under ``runs``, in plan order.

    A folder whose key is not in the current plan was left by an older sweep file and is not counted. Arm, cell, role
    and seed are the plan's. Raises UserError for an unknown sweep.
    """
    saved = read_saved(runs, sweep)
    found = [(planned, read_run(run_folder(runs, sweep, planned.key))) for planned in saved.runs]
    return saved, [_row_of_record(saved, planned, record) for planned, record in found if record is not None]


def _row_of_record(saved: SavedSweep, planned: SavedRun, record: RunRecord) -> RunRow:
    outcome = record.outcome
    return RunRow(
        arm=planned.arm,
        cell=planned.cell,
        factors=saved.cells.get(planned.cell, record.identity.factors),
        role=planned.role,
        seed=planned.seed,
        outcome=outcome.outcome if outcome else UNFINISHED,
        reason=outcome.reason if outcome else "",
        pattern=record.identity.pattern,
        metrics=_finite(
            {name: value for name, value in outcome.metrics.items() if name.startswith(METRIC_SPLITS)}
            if outcome
            else {}
        ),
        cost=_finite(outcome.cost if outcome else {}),
        settings=flatten(record.config),
        link=outcome.mlflow_run_id if outcome else "",
        key=planned.key,
        data_hash=outcome.data_hash if outcome else "",
        order_hash=outcome.order_hash if outcome else "",
    )


def sweep_experiments(client: MlflowClient) -> list[Experiment]:
    """The experiments that hold a sweep, newest first: those that name a report metric."""
    found = _all_pages(lambda token: client.search_experiments(max_results=1000, page_token=token))
    return [experiment for experiment in found if "mixlab.metric.report" in experiment.tags]


def rows_from_mlflow_runs(
    client: MlflowClient, experiment: str, plan: SavedSweep | None = None
) -> tuple[SavedSweep, list[RunRow]]:
    """The plan and rows of the sweep that MLflow keeps as ``experiment`` (its name, or else its id).

    With a ``plan`` (the sweep's own file, where it is at hand) its keys decide which runs count. Without one, arms
    and cells are those of the parent runs, in the order of their creation, the seeds are all that occur, and an
    older run of the same arm, cell, role and seed (for tuning trials also key) gives way to the newest.
    Raises UserError when there is no such experiment or it holds no sweep.
    """
    entry = find_experiment(client, experiment)
    runs = _all_pages(lambda token: client.search_runs([entry.experiment_id], max_results=1000, page_token=token))
    runs = sorted((run for run in runs if "mixlab.arm" in run.data.tags), key=_age)
    saved = plan or _plan_from_runs(entry, runs)
    if plan is not None:
        order = {planned.key: i for i, planned in enumerate(plan.runs)}
        newest = {_tag(run, "key"): run for run in runs if _tag(run, "key") in order and _tag(run, "role") != "parent"}
        return saved, [_row_of_run(newest[key]) for key in sorted(newest, key=order.__getitem__)]
    rows = [_row_of_run(run) for run in runs if _tag(run, "role") != "parent"]
    latest = {(row.arm, row.cell, row.role, row.seed, row.key if row.role == "tuning" else ""): row for row in rows}
    return saved, list(latest.values())


def find_experiment(client: MlflowClient, experiment: str) -> Experiment:
    """The sweep's experiment by name, or else by id; UserError with near matches otherwise."""
    sweeps = sweep_experiments(client)
    for entry in sweeps:
        if entry.name == experiment:
            return entry
    for entry in sweeps:
        if entry.experiment_id == experiment:
            return entry
    raise UserError(f"no sweep {experiment!r} in the tracking store{nearest(experiment, [e.name for e in sweeps])}")


def _plan_from_runs(experiment: Experiment, runs: list[Run]) -> SavedSweep:
    arms: dict[str, str] = {}
    cells: dict[str, dict[str, Any]] = {}
    for run in runs:
        arms.setdefault(_tag(run, "arm"), _tag(run, "pattern"))
        cells.setdefault(_tag(run, "cell"), _json_object(_tag(run, "factors")))
    tags = experiment.tags
    return SavedSweep(
        name=experiment.name,
        question=tags.get("mixlab.question", ""),
        metric={name: tags.get(f"mixlab.metric.{name}", "") for name in ("select", "report", "direction")},
        budget={},
        arms=arms,
        cells=cells,
        seeds=sorted({_seed(run) for run in runs if _tag(run, "role") == "replicate"}),
    )


def _row_of_run(run: Run) -> RunRow:
    metrics = run.data.metrics
    return RunRow(
        arm=_tag(run, "arm"),
        cell=_tag(run, "cell"),
        factors=_json_object(_tag(run, "factors")),
        role=_tag(run, "role"),
        seed=_seed(run),
        outcome=_tag(run, "outcome") or UNFINISHED,
        reason=_tag(run, "reason"),
        pattern=_tag(run, "pattern"),
        metrics=_finite({name: value for name, value in metrics.items() if name.startswith(METRIC_SPLITS)}),
        cost=_finite({name[5:]: value for name, value in metrics.items() if name.startswith("cost/")}),
        settings={name: _parsed(text) for name, text in run.data.params.items()},
        link=run.info.run_id,
        key=_tag(run, "key"),
        data_hash=_tag(run, "data_hash"),
    )


def _tag(run: Run, name: str) -> str:
    return run.data.tags.get(f"mixlab.{name}", "")


def _seed(run: Run) -> int:
    text = _tag(run, "seed")
    return int(text) if text.isdigit() else -1


def _age(run: Run) -> tuple[int, int, str]:
    """Sorts older runs first; the id only makes ties the same each time."""
    return run.info.start_time or 0, run.info.end_time or 0, run.info.run_id


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


@lru_cache(maxsize=100_000)  # a few values fill the settings of thousands of runs
def _parsed(text: str) -> Any:
    """MLflow keeps parameters as text; give numbers, booleans and None back."""
    words = {"None": None, "True": True, "False": False}
    if text in words:
        return words[text]
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        return text
    return int(text) if text.lstrip("+-").isdigit() else number


def _finite(values: dict[str, Any]) -> dict[str, float | None]:
    """NaN and infinity become None; MLflow keeps an infinity as the largest double."""
    return {
        name: float(value) if value is not None and math.isfinite(value) and abs(value) < 1.79e308 else None
        for name, value in values.items()
    }


def _all_pages(page: Any) -> list[Any]:
    found: list[Any] = []
    token: str | None = None
    while True:
        part = page(token)
        found.extend(part)
        token = part.token
        if not token:
            return found


def replicates(rows: Iterable[RunRow]) -> list[RunRow]:
    return [row for row in rows if row.role == "replicate"]


def environments(runs: Path, sweep: str, rows: Iterable[RunRow]) -> dict[str, Any]:
    """What the runs ran on: package ``versions`` and ``git``, ``device`` and ``platform`` states, each value once."""
    found: dict[str, dict[str, Any]] = {"versions": {}, "git": {}, "device": {}, "gpu": {}, "platform": {}}
    for row in rows:
        values = read_json(run_folder(runs, sweep, row.key) / "environment.json")
        if not isinstance(values, dict):
            continue
        for name, version in values.get("versions", {}).items():
            found["versions"][f"{name} {version}"] = None
        for name in ("git", "device", "gpu", "platform"):
            if values.get(name):
                found[name][str(values[name])] = None
    return {name: sorted(seen) for name, seen in found.items() if seen}
