"""Where runs are executed: a small interface, of which a driver knows no more.

An executor only runs jobs; which ones, in which order and how often is the driver's affair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

TARGET = "experiments.run:run_experiment"
# Workers that die before they are ready are started again; so many in a row mean that none can start.
MAX_FAILED_STARTS = 2
# One that is killed from outside while it starts says nothing about the next one, but there is an end to that too.
MAX_KILLED_STARTS = 10
# A training reports after every step; building, compiling and evaluating a large model may take minutes in silence.
STALL_PATIENCE_S = 1800.0


@dataclass(frozen=True)
class Job:
    """One training for a worker: identity and config as JSON values, ``tracking`` as in ``TrackingTarget``."""

    key: str
    identity: dict[str, Any]
    config: dict[str, Any]
    runs: str
    tracking: dict[str, str] | None = None


@dataclass(frozen=True)
class Started:
    """A worker has begun a job."""

    key: str
    worker: int


@dataclass(frozen=True)
class Reported:
    """A job's progress: ``step`` of ``n_steps``, and newest metrics; ``evaluated`` where select was, at this step."""

    key: str
    worker: int
    step: int
    n_steps: int
    metrics: dict[str, float | None]
    note: str = ""
    evaluated: bool = False


@dataclass(frozen=True)
class Ended:
    """A job's record is complete: its folder holds the outcome. ``halt`` says why no other run can go on either."""

    key: str
    worker: int
    halt: str = ""


@dataclass(frozen=True)
class Lost:
    """The worker went away in the middle of a job. ``reason`` names signal or exit code.

    ``from_outside``: somebody killed it, for which the job is not to blame.
    """

    key: str
    worker: int
    reason: str
    from_outside: bool = False


ExecutorEvent = Started | Reported | Ended | Lost


class Executor(ABC):
    """Runs jobs somewhere. Used from one thread."""

    @property
    @abstractmethod
    def n_workers(self) -> int:
        """Jobs that can run at a time."""

    @property
    @abstractmethod
    def n_free(self) -> int:
        """Jobs that can be submitted now."""

    @property
    @abstractmethod
    def busy(self) -> frozenset[str]:
        """Keys of the jobs that are running."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Start a job; only while ``n_free > 0``."""

    @abstractmethod
    def poll(self, timeout_s: float) -> list[ExecutorEvent]:
        """Wait for events at most this long."""

    @abstractmethod
    def interrupt(self) -> None:
        """Ask all running jobs to save a checkpoint and end as ``killed``. They end with ``Ended``."""

    @abstractmethod
    def close(self) -> None:
        """End all workers; jobs that still run are lost without an event."""
