"""What the contract suite found out about one mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "excused", "not_applicable", "stale_excuse"]
BAD: frozenset[Status] = frozenset({"failed", "stale_excuse"})


@dataclass(frozen=True)
class CheckResult:
    """One check: ``message`` is empty when it passed, else what was found, or why it was excused or left out.

    ``stale_excuse``: it was excused and passes, so that the excuse must go. ``seconds``: wall time.
    """

    name: str
    status: Status
    message: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.status not in BAD


@dataclass(frozen=True)
class Report:
    """All checks of one mixer, in the order in which they ran."""

    results: tuple[CheckResult, ...]

    @property
    def ok(self) -> bool:
        """No check failed and no excuse is stale."""
        return all(result.ok for result in self.results)

    def __getitem__(self, name: str) -> CheckResult:
        """The result of one check."""
        return {result.name: result for result in self.results}[name]

    def __str__(self) -> str:
        return "\n".join(f"{result.name}: {result.status} {result.message}".rstrip() for result in self.results)
