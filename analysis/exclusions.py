"""Every planned run that no mean contains, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.runs import RunRow
from sweeps.saved import SavedSweep


@dataclass(frozen=True)
class Exclusion:
    """``outcome`` is that of the run, ``missing`` where there is no record of it, or ``no <metric>``."""

    arm: str
    cell: str
    role: str
    seed: int
    outcome: str
    reason: str
    key: str


def exclusions(saved: SavedSweep, rows: Sequence[RunRow]) -> tuple[Exclusion, ...]:
    """Runs that did not finish, finished ones without the metric they were made for, and those never run."""
    metric = {"replicate": saved.metric["report"], "tuning": saved.metric["select"]}
    found = []
    for row in rows:
        outcome = row.outcome
        if outcome == "finished" and row.metrics.get(metric.get(row.role, "")) is None:
            outcome = f"no {metric.get(row.role, 'metric')}"
        if outcome != "finished":
            found.append(Exclusion(row.arm, row.cell, row.role, row.seed, outcome, row.reason, row.key))
    done = {(row.arm, row.cell, row.seed) for row in rows if row.role == "replicate"}
    keys = {(run.arm, run.cell, run.seed): run.key for run in saved.runs if run.role == "replicate"}
    recorded = {row.key for row in rows}
    for arm in saved.arms:
        for cell in saved.cells:
            why = saved.chosen.get(f"{arm} | {cell}", {}).get("reason", "")
            for seed in saved.seeds:
                if (arm, cell, seed) not in done:
                    found.append(
                        Exclusion(arm, cell, "replicate", seed, "missing", why, keys.get((arm, cell, seed), ""))
                    )
    for run in saved.runs:
        if run.role == "tuning" and run.key not in recorded:
            found.append(Exclusion(run.arm, run.cell, "tuning", run.seed, "missing", "", run.key))
    return tuple(found)
