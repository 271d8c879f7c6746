"""All statistics of a sweep beside the table of means, from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from analysis.capacity import Capacity, capacities
from analysis.comparison import DEFAULT_X, Comparison
from analysis.comparison import as_json as comparisons_json
from analysis.exclusions import Exclusion, exclusions
from analysis.paired import PairedDifference, paired_differences
from analysis.pareto_probability import pareto_probabilities
from analysis.runs import RunRow, replicates
from analysis.seeds import SeedTable, seed_tables
from analysis.stats.bootstrap import studentised
from analysis.tuning import Tuning, edge_notes, equal_tuning, tunings
from experiments.records import finite
from sweeps.saved import SavedSweep


@dataclass(frozen=True)
class Findings:
    """pareto_probability and bootstrap by (arm, cell); bootstrap is (low, high) of the mean of ``y``, None where there
    are fewer than 5 finished seeds. tuning_faults: each way in which arms did not have the same chance; edges: each
    optimum at the end of what was searched."""

    x: str
    y: str
    baseline: str | None
    paired: tuple[PairedDifference, ...]
    pareto_probability: dict[tuple[str, str], float | None]
    bootstrap: dict[tuple[str, str], tuple[float, float] | None]
    capacity: tuple[Capacity, ...]
    tuning: tuple[Tuning, ...]
    equal_tuning: bool
    tuning_faults: tuple[str, ...]
    edges: tuple[str, ...]
    exclusions: tuple[Exclusion, ...]


def findings(
    saved: SavedSweep,
    rows: Sequence[RunRow],
    lines: Sequence[Comparison],
    *,
    x: str = DEFAULT_X,
    y: str | None = None,
    baseline: str | None = None,
) -> Findings:
    """``lines`` are those of :func:`analysis.comparison.compare` for the same axes."""
    y = y or saved.metric["report"]
    runs = replicates(rows)
    tables = seed_tables(saved, runs)
    tuned = tunings(saved, runs, lines)
    equal, faults = equal_tuning(saved, rows, tuned)
    return Findings(
        x=x,
        y=y,
        baseline=baseline,
        paired=paired_differences(tables, y, baseline),
        pareto_probability=pareto_probabilities(tables, saved.metric, x, y),
        bootstrap=_bootstrap(tables, y),
        capacity=capacities(saved, runs, lines),
        tuning=tuned,
        equal_tuning=equal,
        tuning_faults=faults,
        edges=edge_notes(tuned),
        exclusions=exclusions(saved, rows),
    )


def _bootstrap(tables: Sequence[SeedTable], y: str) -> dict[tuple[str, str], tuple[float, float] | None]:
    """All arm-cells with the same number of finished seeds are resampled together."""
    found: dict[tuple[str, str], tuple[float, float] | None] = {}
    groups: dict[int, list[tuple[tuple[str, str], np.ndarray]]] = {}
    for table in tables:
        for arm, column in zip(table.arms, table.values(y).T, strict=True):
            present = column[np.isfinite(column)]
            found[arm, table.cell] = None
            groups.setdefault(len(present), []).append(((arm, table.cell), present))
    for members in groups.values():
        lows, highs = studentised(np.stack([values for _, values in members]))
        for (name, _), low, high in zip(members, lows, highs, strict=True):
            if np.isfinite(low) and np.isfinite(high):
                found[name] = float(low), float(high)
    return found


def as_json(found: Findings) -> dict[str, Any]:
    """Plain JSON values without NaN: ``paired``, ``pareto_probability``, ``bootstrap``, ``capacity``, ``tuning`` and
    ``exclusions``. What belongs to an arm and cell is a list of objects that name both."""
    return finite(
        {
            "paired": {
                "metric": found.y,
                "baseline": found.baseline,
                "n_comparisons": len(found.paired),
                "differences": [vars(each) for each in found.paired],
            },
            "pareto_probability": [
                {"arm": arm, "cell": cell, "probability": p} for (arm, cell), p in found.pareto_probability.items()
            ],
            "bootstrap": [
                {"arm": arm, "cell": cell, "low": bounds[0], "high": bounds[1]}
                for (arm, cell), bounds in found.bootstrap.items()
                if bounds is not None
            ],
            "capacity": [asdict(each) for each in found.capacity],
            "tuning": {
                "equal": found.equal_tuning,
                "faults": list(found.tuning_faults),
                "edges": list(found.edges),
                "arm_cells": [asdict(each) for each in found.tuning],
            },
            "exclusions": [vars(each) for each in found.exclusions],
        }
    )


def json_lines(lines: Sequence[Comparison], found: Findings) -> list[dict[str, Any]]:
    """What `mixlab compare --json` prints: the comparisons, each with what the findings say of its arm and cell."""
    values = as_json(found)
    by_name: dict[tuple[str, str], dict[str, Any]] = {
        (line.arm, line.cell): {
            "pareto_probability": found.pareto_probability.get((line.arm, line.cell)),
            "bootstrap": None,
            "paired": [],
            "capacity": [],
            "tuning": None,
            "exclusions": [],
        }
        for line in lines
    }
    for each in values["bootstrap"]:
        by_name[each["arm"], each["cell"]]["bootstrap"] = {"low": each["low"], "high": each["high"]}
    for each in values["paired"]["differences"]:
        by_name[each["a"], each["cell"]]["paired"].append(each)
    for each in values["tuning"]["arm_cells"]:
        by_name[each["arm"], each["cell"]]["tuning"] = each
    for each in values["exclusions"]:
        if (each["arm"], each["cell"]) in by_name:
            by_name[each["arm"], each["cell"]]["exclusions"].append(each)
    for line in lines:
        by_name[line.arm, line.cell]["capacity"] = [each for each in values["capacity"] if each["arm"] == line.arm]
    return [{**each, **by_name[each["arm"], each["cell"]]} for each in comparisons_json(lines)]
