"""What figures are made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from analysis.comparison import Comparison
from analysis.findings import Findings
from analysis.history import MemoryUse
from analysis.palette import Style, styles
from sweeps.saved import SavedSweep


class DoesNotApply(Exception):
    """A figure for which the sweep has no data; the message says what is missing."""


@dataclass(frozen=True)
class FigureData:
    """A sweep's comparison and statistics; ``memory_use`` of its fast-weight memories over training; ``bench`` what
    `mixlab bench mixers --json` wrote, None without; ``chance`` the accuracy of guessing, None where not known."""

    saved: SavedSweep
    lines: list[Comparison]
    found: Findings
    chance: float | None = None
    memory_use: list[MemoryUse] = field(default_factory=list)
    bench: dict[str, Any] | None = None

    @property
    def looks(self) -> dict[str, Style]:
        return styles(self.saved.arms)
