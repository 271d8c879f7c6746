"""All that the comparison page shows, as one JSON value: the page itself only draws."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from analysis.axes import axis
from analysis.comparison import (
    DEFAULT_X,
    Comparison,
    as_json,
    axis_names,
    chance_accuracy,
)
from analysis.findings import Findings, findings
from analysis.findings import as_json as findings_json
from analysis.history import MemoryUse
from analysis.method import method
from analysis.notes import notes_for
from analysis.palette import styles
from analysis.runs import RunRow, replicates
from experiments.records import finite
from sweeps.saved import SavedSweep

# settings that differ from run to run by design, or only repeat what the page shows anyway
_NOT_TOLD = ("seed", "seeds.", "model.pattern")


def payload(
    saved: SavedSweep,
    rows: list[RunRow],
    comparisons: list[Comparison],
    found: Findings | None = None,
    *,
    x: str = DEFAULT_X,
    y: str | None = None,
    experiment_id: str = "",
    environment: dict[str, Any] | None = None,
    history: Iterable[MemoryUse] = (),
) -> dict[str, Any]:
    """``comparisons`` as ``mixlab compare --json`` gives them, the single runs, and how to show both.

    With the statistics: ``paired``, ``pareto_probability``, ``bootstrap``, ``capacity``, ``tuning``, ``exclusions``
    (:func:`analysis.findings.as_json`) and ``method`` (:func:`analysis.method.method`). ``settings`` of a run holds
    those in which runs differ, ``shared_settings`` the others. ``found``: the findings, where they are at hand.

    ``history`` of fast-weight memories over training becomes ``memory_use``.

    ``experiment_id`` is that of MLflow when the page is served beside it: then runs are links.
    """
    runs = replicates(rows)
    names = axis_names(saved, comparisons)
    chance = chance_accuracy(runs)
    found = found or findings(saved, rows, comparisons, x=x, y=y)
    differing = differing_settings(runs)
    few = {
        "sweep": {
            "name": saved.name,
            "question": saved.question,
            "metric": saved.metric,
            "seeds": saved.seeds,
            "arms": [
                {"name": arm, "pattern": pattern, **vars(style)}
                for (arm, pattern), style in zip(saved.arms.items(), styles(saved.arms).values(), strict=True)
            ],
            "cells": [{"label": cell, "factors": factors} for cell, factors in saved.cells.items()],
        },
        "axes": [vars(axis(name, saved.metric)) for name in names],
        "x": found.x,
        "y": found.y,
        "told_settings": [name for name in differing if not name.startswith(_NOT_TOLD)],
        "shared_settings": {
            name: value for row in runs[:1] for name, value in row.settings.items() if name not in set(differing)
        },
        "references": [
            {"axis": name, "label": "chance", "value": chance}
            for name in names
            if chance is not None and name.split("/")[1:] == ["accuracy"]
        ],
        "notes": [vars(note) for note in notes_for(saved, runs, comparisons)],
        "experiment_id": experiment_id,
        "method": method(saved, rows, found, environment),
    }
    # these are many, and finite already
    many = {
        "comparisons": as_json(comparisons),
        "runs": [{**vars(row), "settings": {name: row.settings.get(name) for name in differing}} for row in runs],
        **findings_json(found),
        "memory_use": [finite(vars(each)) for each in history],
    }
    return finite(few) | many


def differing_settings(runs: list[RunRow]) -> list[str]:
    """The settings in which the runs differ, sorted."""
    values: dict[str, set[Any]] = {}
    for row in runs:
        for name, value in row.settings.items():
            # not all values can be hashed; 1 and True are the same to a set
            values.setdefault(name, set()).add(value if isinstance(value, str) else repr(value))
    return sorted(name for name, seen in values.items() if len(seen) > 1)
