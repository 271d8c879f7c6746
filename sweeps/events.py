"""What happens during a sweep, as the driver tells it to whoever shows it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from experiments.records import finite


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    def to_json(self) -> dict[str, Any]:
        """``{"event": "run_ended", ...}``: the name in words with underscores, and all fields."""
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        return {"event": name, **finite(asdict(self))}


@dataclass(frozen=True)
class SweepStarted(Event):
    """``count`` spells the plan out; ``n_done`` of ``n_runs`` were there already."""

    sweep: str
    question: str
    count: str
    n_runs: int
    n_done: int
    n_workers: int
    direction: str
    select: str
    report: str


@dataclass(frozen=True)
class Note(Event):
    """Something that the user should know, in words."""

    message: str


@dataclass(frozen=True)
class RunStarted(Event):
    key: str
    arm: str
    cell: str
    role: str
    seed: int
    trial: int | None
    worker: int


@dataclass(frozen=True)
class RunProgress(Event):
    key: str
    arm: str
    cell: str
    worker: int
    step: int
    n_steps: int
    metrics: dict[str, float | None]
    note: str = ""


@dataclass(frozen=True)
class RunEnded(Event):
    """``value`` is the select metric of a tuning run, the report metric of a replicate; None without one.

    ``worker`` is None for a run that was already on disk when the driver started.
    """

    key: str
    arm: str
    cell: str
    role: str
    seed: int
    trial: int | None
    outcome: str
    reason: str
    value: float | None
    wall_s: float
    n_done: int
    n_runs: int
    worker: int | None


@dataclass(frozen=True)
class RunRetried(Event):
    """The worker went away; the run is tried again."""

    key: str
    arm: str
    cell: str
    worker: int
    reason: str


@dataclass(frozen=True)
class Chosen(Event):
    """Tuning of an arm-cell is over. ``settings`` None: no trial can be chosen, and no replicate is run."""

    arm: str
    cell: str
    settings: dict[str, Any] | None
    value: float | None
    reason: str


@dataclass(frozen=True)
class SweepEnded(Event):
    """``outcomes`` counts all runs of the plan by outcome, with ``not_run`` and ``missing`` for those without one."""

    sweep: str
    interrupted: bool
    wall_s: float
    outcomes: dict[str, int] = field(default_factory=dict)
