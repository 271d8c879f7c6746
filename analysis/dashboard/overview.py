"""Where every sweep of a store stands: how many runs ended how, and the best that each arm has reached so far."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from analysis.dashboard.store import StoredExperiment, StoredRun
from sweeps.saved import SavedSweep

# MLflow keeps an infinity as the largest double
_LARGEST = 1.79e308
OUTCOMES = ("finished", "diverged", "failed", "pruned", "killed", "running")


def sweep_overview(experiment: StoredExperiment, runs: list[StoredRun], plan: SavedSweep | None) -> dict[str, Any]:
    """One sweep as plain JSON values.

    ``planned`` is None where nothing says how many runs there are to be. ``best`` of an arm and cell is the best select
    value of its finished runs, ``current`` that of its running ones at their latest evaluation, ``report`` the mean
    over its finished replicates. ``changed_ms`` is when a run last began, logged or ended.
    """
    metric = {name: experiment.tags.get(f"mixlab.metric.{name}", "") for name in ("select", "report", "direction")}
    better = min if metric["direction"] == "minimize" else max
    groups: dict[tuple[str, str], list[StoredRun]] = {}
    patterns: dict[str, str] = {}
    for run in runs:
        tags = run.data.tags
        if "mixlab.arm" not in tags:
            continue
        patterns.setdefault(tags["mixlab.arm"], tags.get("mixlab.pattern", ""))
        group = groups.setdefault((tags["mixlab.arm"], tags.get("mixlab.cell", "")), [])
        if tags.get("mixlab.role") != "parent":
            group.append(run)
    if plan is not None:
        keys = {planned.key for planned in plan.runs}
        groups = {
            (arm, cell): [run for run in groups.get((arm, cell), []) if run.data.tags.get("mixlab.key") in keys]
            for arm in plan.arms
            for cell in plan.cells
        }
        patterns = plan.arms
    lines = []
    for (arm, cell), found in groups.items():
        found = _newest(found)
        ended = [run for run in found if outcome(run) == "finished"]
        selects = _values(ended, metric["select"])
        current = _values([run for run in found if outcome(run) == "running"], metric["select"])
        reports = _values([run for run in ended if run.data.tags.get("mixlab.role") == "replicate"], metric["report"])
        lines.append(
            {
                "arm": arm,
                "cell": cell,
                "counts": dict(Counter(map(outcome, found))),
                "best": better(selects) if selects else None,
                "current": better(current) if current else None,
                "report": math.fsum(reports) / len(reports) if reports else None,
                "n_report": len(reports),
            }
        )
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line["counts"])
    return {
        "id": experiment.experiment_id,
        "name": experiment.name,
        "question": experiment.tags.get("mixlab.question", ""),
        "metric": metric,
        "created_ms": experiment.creation_time,
        "changed_ms": max([_changed(run) for run in runs], default=experiment.creation_time),
        "planned": n_planned(plan) if plan is not None else _number(experiment.tags.get("mixlab.n_runs")),
        "counts": {name: counts[name] for name in OUTCOMES},
        "arms": [{"name": arm, "pattern": pattern} for arm, pattern in patterns.items()],
        "cells": list(dict.fromkeys(cell for _, cell in groups)),
        "lines": lines,
    }


def n_planned(plan: SavedSweep) -> int:
    """How many runs a sweep is to have, counted as `mixlab sweep status` does."""
    trials: Counter[str] = Counter(f"{run.arm} | {run.cell}" for run in plan.runs if run.trial is not None)
    n_runs = 0
    for arm in plan.arms:
        for cell in plan.cells:
            where = f"{arm} | {cell}"
            choice = plan.chosen.get(where)
            # fewer trials, where a sampler proposed settings twice; no replicates, where none could be chosen
            n_runs += trials[where] if choice else plan.budget.get("tune_trials", 0)
            n_runs += 0 if choice and choice["settings"] is None else len(plan.seeds)
    return n_runs


def outcome(run: StoredRun) -> str:
    """How a run ended, or ``running``; ``killed`` also where it left no word."""
    if run.info.status in ("RUNNING", "SCHEDULED"):
        return "running"
    told = run.data.tags.get("mixlab.outcome", "")
    return told if told in OUTCOMES else "killed"


def _newest(runs: list[StoredRun]) -> list[StoredRun]:
    """The last run of every key: an older one was started anew."""
    return list({run.data.tags.get("mixlab.key") or run.info.run_id: run for run in runs}.values())


def _values(runs: list[StoredRun], name: str) -> list[float]:
    found = [run.data.metrics.get(name) for run in runs]
    return [value for value in found if value is not None and abs(value) < _LARGEST]  # NaN is not less either


def _changed(run: StoredRun) -> int:
    return max(run.info.start_time or 0, run.info.end_time or 0, run.data.logged_ms)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
