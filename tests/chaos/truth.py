"""What a sweep has found, without its timings, and how two such findings differ."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.records import FINAL_OUTCOMES, read_json, read_metrics, read_outcome
from tests.chaos.sandbox import NAME, Sandbox

# Everything else of a row and of an outcome has to be equal to the last bit.
TIMINGS = {"time_ms", "wall_s", "train/tokens_per_s"}
OF_THE_TRY = {"wall_s", "cost", "mlflow_run_id"}


@dataclass
class Found:
    """Everything that a sweep has found."""

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)  # key -> identity, config, outcome, rows
    planned: list[str] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=dict)


@dataclass
class Verdict:
    """Keys of runs that are lost, there twice or different, and whatever else is wrong, in words."""

    lost: set[str] = field(default_factory=set)
    doubled: set[str] = field(default_factory=set)
    differing: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def read_found(runs: Path) -> Found:
    saved = read_json(runs / NAME / "sweep.json") or {"runs": [], "chosen": {}}
    found = Found(planned=[run["key"] for run in saved["runs"]], chosen=saved["chosen"])
    for folder in (runs / NAME).glob("*"):
        outcome = read_outcome(folder) if folder.is_dir() else None
        if outcome is None or outcome.outcome not in FINAL_OUTCOMES:
            continue
        found.runs[folder.name] = {
            "identity": read_json(folder / "run.json"),
            "config": read_json(folder / "config.json"),
            "outcome": {name: value for name, value in asdict(outcome).items() if name not in OF_THE_TRY},
            "rows": [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(folder)],
        }
    return found


def judge(sandbox: Sandbox, truth: Found) -> Verdict:
    """The sweep in ``sandbox`` beside the undisturbed one."""
    found, verdict = read_found(sandbox.runs), Verdict()
    verdict.lost = {key for key in truth.planned if key not in found.runs or key not in found.planned}
    verdict.doubled = {key for key, n in Counter(found.planned).items() if n > 1}
    verdict.doubled |= {key for key in found.runs if key not in found.planned}
    verdict.doubled |= run_again(sandbox)
    shared = truth.runs.keys() & found.runs.keys()
    verdict.differing = {key for key in shared if found.runs[key] != truth.runs[key]}
    for arm_cell, choice in truth.chosen.items():
        if found.chosen.get(arm_cell) != choice:
            verdict.problems.append(f"{arm_cell}: chosen {found.chosen.get(arm_cell)} instead of {choice}")
    verdict.problems += left_over(sandbox.runs)
    if "--no-tracking" not in sandbox.options:
        verdict.problems += mlflow_problems(sandbox.runs, sandbox.environment.get("MLFLOW_TRACKING_URI"))
    return verdict


def run_again(sandbox: Sandbox) -> set[str]:
    """Runs that were started, or ended as new, after they had already ended with a result."""
    ended: set[str] = set()
    again: set[str] = set()
    for driver in sandbox.drivers:
        for _, event in driver.events:
            if event["event"] == "run_started" and event["key"] in ended:
                again.add(event["key"])
            if event["event"] == "run_ended":
                again |= {event["key"]} & ended if event["worker"] is not None else set()
                ended.add(event["key"])
    return again - sandbox.redone


def left_over(runs: Path) -> list[str]:
    """Files that no finished sweep has."""
    names = sorted({path.name for pattern in (".*.tmp", "checkpoint.pt") for path in runs.rglob(pattern)})
    return [f"left over: {', '.join(names)}"] if names else []


def mlflow_problems(runs: Path, uri: str | None = None) -> list[str]:
    """Where MLflow has not exactly one finished run for each record, with the same final metrics."""
    from experiments.paths import tracking_uri
    from experiments.tracking.client import all_runs, client_of

    client = client_of(uri or tracking_uri(runs))
    experiment = client.get_experiment_by_name(NAME)
    by_key: dict[str, list[Any]] = {}
    for run in all_runs(client, experiment.experiment_id, "tags.`mixlab.key` LIKE '%'"):
        by_key.setdefault(run.data.tags["mixlab.key"], []).append(run)
    records = read_found(runs).runs
    problems = [f"MLflow has unknown run {key}" for key in by_key.keys() - records.keys()]
    for key, record in records.items():
        mirrored = by_key.get(key, [])
        if [run.info.status for run in mirrored] != ["FINISHED"]:
            problems.append(f"{key}: MLflow has {[run.info.status for run in mirrored]}")
        elif {k: mirrored[0].data.metrics.get(k) for k in record["outcome"]["metrics"]} != record["outcome"]["metrics"]:
            problems.append(f"{key}: MLflow has other final metrics")
    return problems
