"""All that the comparison page shows, as one JSON value: the page itself only draws."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from analysis.axes import axis
from analysis.comparison import (
    DEFAULT_X,
    Comparison,
    as_json,
    axis_names,
    chance_accuracy,
)
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
    *,
    x: str = DEFAULT_X,
    y: str | None = None,
    experiment_id: str = "",
) -> dict[str, Any]:
    """``comparisons`` as ``mixlab compare --json`` gives them, the single runs, and how to show both.

    ``experiment_id`` is that of MLflow when the page is served beside it: then runs are links.
    """
    runs = replicates(rows)
    names = axis_names(saved, comparisons)
    chance = chance_accuracy(runs)
    return finite(
        {
            "sweep": {
                "name": saved.name,
                "question": saved.question,
                "metric": saved.metric,
                "seeds": saved.seeds,
                "arms": [
                    {"name": arm, "pattern": pattern, **asdict(style)}
                    for (arm, pattern), style in zip(saved.arms.items(), styles(saved.arms).values(), strict=True)
                ],
                "cells": [{"label": cell, "factors": factors} for cell, factors in saved.cells.items()],
            },
            "comparisons": as_json(comparisons),
            "runs": [asdict(row) for row in runs],
            "axes": [asdict(axis(name, saved.metric)) for name in names],
            "x": x,
            "y": y or saved.metric["report"],
            "told_settings": told_settings(runs),
            "references": [
                {"axis": name, "label": "chance", "value": chance}
                for name in names
                if chance is not None and name.split("/")[1:] == ["accuracy"]
            ],
            "notes": [asdict(note) for note in notes_for(saved, runs, comparisons)],
            "experiment_id": experiment_id,
        }
    )


def told_settings(runs: list[RunRow]) -> list[str]:
    """The settings worth showing on hover: those in which the runs differ, sorted."""
    values: dict[str, set[str]] = {}
    for row in runs:
        for name, value in row.settings.items():
            values.setdefault(name, set()).add(str(value))
    return sorted(name for name, seen in values.items() if len(seen) > 1 and not name.startswith(_NOT_TOLD))
