"""Events of a running experiment: what a progress bar, a driver or a log needs to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """One report of a training: ``step`` of ``n_steps``, and the newest metrics by full name.

    ``evaluated``: at this very step, before the end, the select split was evaluated.
    """

    step: int
    n_steps: int
    metrics: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    evaluated: bool = False


OnProgress = Callable[[Progress], None]


class Pruned(BaseException):
    """Told that it can't win: the run records ``pruned`` with its last values and ends. Not an error of the run."""


class Interrupted(BaseException):
    """Asked to stop: the run saves a checkpoint, records ``killed`` and ends. Not an error of the run."""
