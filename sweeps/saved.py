"""What the driver writes about a sweep beside its runs: RUNS/<sweep>/sweep.json, read by status and analysis.

It names the runs of the *current* plan by key, so that runs left by an older version of the sweep file are
kept on disk but never counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.errors import UserError, nearest
from experiments.records import read_json, write_json


@dataclass(frozen=True)
class SavedRun:
    """One planned run. ``trial`` numbers the tuning trials of an arm and cell; None for replicates."""

    key: str
    arm: str
    cell: str
    role: str
    seed: int
    trial: int | None = None


@dataclass(frozen=True)
class SavedSweep:
    """A sweep as planned. ``metric`` has select, report, direction; ``arms`` name -> pattern; ``cells`` label ->
    factors; ``chosen`` "arm | cell" -> the tuned settings and the select value that they reached;
    ``match`` the [match] table with ``reached``, "arm | cell" -> value, target and cost, empty without one;
    ``definition`` the sweep file with experiment and overrides laid into it: it alone repeats the sweep;
    ``code`` file -> hash, of the code that runs depend on and that is not as released; ``n_threads`` of torch in each
    run, 0 where it is not known."""

    name: str
    question: str
    metric: dict[str, str]
    budget: dict[str, Any]
    arms: dict[str, str]
    cells: dict[str, dict[str, Any]]
    seeds: list[int]
    tune: dict[str, Any] = field(default_factory=dict)
    runs: list[SavedRun] = field(default_factory=list)
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)
    match: dict[str, Any] = field(default_factory=dict)
    definition: dict[str, Any] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    n_threads: int = 0


def write_saved(runs: Path, saved: SavedSweep) -> None:
    write_json(runs / saved.name / "sweep.json", asdict(saved))


def read_saved(runs: Path, name: str) -> SavedSweep:
    """The sweep called ``name``; an unknown one lists the near matches."""
    values = read_json(runs / name / "sweep.json")
    if not isinstance(values, dict):
        raise UserError(f"no sweep {name!r} under {runs}{nearest(name, saved_names(runs))}")
    return SavedSweep(**{**values, "runs": [SavedRun(**run) for run in values["runs"]]})


def saved_names(runs: Path) -> list[str]:
    return sorted(path.parent.name for path in runs.glob("*/sweep.json"))
