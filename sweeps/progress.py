"""Where each arm-cell of a sweep stands, and which run comes next. Knows records and plan, but no worker."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from experiments.errors import UserError
from experiments.records import RunOutcome
from sweeps.plan import ArmCell, PlannedRun
from sweeps.saved import SavedRun
from sweeps.tuning import Choice, Tuning


@dataclass
class ArmCellProgress:
    """One arm-cell: first its tuning, then, as soon as that is complete, its replicates.

    ``read`` gives the final outcome recorded under a key, or None. Without tuning the replicates are there at once.
    """

    arm_cell: ArmCell
    tuning: Tuning | None
    read: Callable[[str], RunOutcome | None]
    choice: Choice | None = None
    results: dict[str, RunOutcome] = field(default_factory=dict)  # of replicates, by key
    replicates: tuple[PlannedRun, ...] = ()
    _waiting: deque[PlannedRun] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if self.tuning is None:
            self._plan_replicates({})
        else:
            for run in self.tuning.runs.values():
                if run.key in self.tuning.results:
                    self._check_metric(run, self.tuning.results[run.key])
            self._choose()

    @property
    def tunes(self) -> bool:
        """Whether its replicates have to wait for a choice."""
        return self.tuning is not None and self.choice is None

    @property
    def n_waiting(self) -> int:
        """Replicates that can start."""
        return len(self._waiting)

    @property
    def expected_s(self) -> float:
        """Seconds of training that one more run will take, by those that have ended; 0 where none has."""
        ended = (*(self.tuning.results if self.tuning else {}).values(), *self.results.values())
        return statistics.fmean(outcome.wall_s for outcome in ended) if ended else 0.0

    @property
    def n_runs(self) -> int:
        """Runs that it will have made: a count that shrinks when tuning chooses nothing, or proposes things twice."""
        if self.choice is not None and self.choice.settings is None:
            return self._n_trials
        return self._n_trials + len(self.arm_cell.sweep.seeds)

    @property
    def n_done(self) -> int:
        return len(self.results) + (len(self.tuning.results) if self.tuning else 0)

    @property
    def n_not_run(self) -> int:
        """Replicates that no settings could be chosen for."""
        return self._n_trials + len(self.arm_cell.sweep.seeds) - self.n_runs

    @property
    def _n_trials(self) -> int:
        return self.tuning.n_trials if self.tuning else 0

    def outcomes(self) -> Counter[str]:
        tuned = self.tuning.results.values() if self.tuning else ()
        return Counter(outcome.outcome for outcome in (*tuned, *self.results.values()))

    def next_run(self) -> PlannedRun | None:
        """The next run that can start; None while there is nothing but to wait, and when all is done."""
        if self.tunes:
            run = self.tuning.next_run()
            self._choose()  # the last trial may have been on record
            if run is not None or self.choice is None:
                return run
        return self._waiting.popleft() if self._waiting else None

    def record(self, run: PlannedRun, outcome: RunOutcome) -> Choice | None:
        """Take a run's final outcome; return the choice where this one completed the tuning."""
        self._check_metric(run, outcome)
        if run.trial is None:
            self.results[run.key] = outcome
            return None
        assert self.tuning is not None
        self.tuning.tell(run, outcome)
        return self._choose()

    def reason_to_prune(self, run: PlannedRun, step: int, metrics: dict[str, float | None]) -> str:
        """Why a tuning trial that reached these values at ``step`` is to end now; nothing while it may go on."""
        value = metrics.get(self._metric(run))
        if self.tuning is None or run.trial is None or value is None or not self.tuning.prunes(run, step, value):
            return ""
        search = self.arm_cell.sweep.search
        return f"{search.pruner} pruner: {self._metric(run)} = {value:.4g} at step {step}"

    def value(self, run: PlannedRun, outcome: RunOutcome) -> float | None:
        """The metric that counts for this run: select while tuning, report for a replicate."""
        return outcome.metrics.get(self._metric(run))

    def saved_runs(self) -> list[SavedRun]:
        """All runs whose settings are known."""
        tuned = sorted(self.tuning.runs.values(), key=lambda run: run.trial) if self.tuning else []
        return [
            SavedRun(run.key, run.identity.arm, run.identity.cell, run.identity.role, run.identity.seed, run.trial)
            for run in (*tuned, *self.replicates)
        ]

    def saved_choice(self) -> dict[str, Any] | None:
        if self.tuning is None or self.choice is None:
            return None
        choice = self.choice
        return {
            "settings": choice.settings,
            "value": choice.value,
            "key": choice.key,
            "trial": choice.trial,
            "reason": choice.reason,
            **({"front": list(choice.front)} if choice.front else {}),
        }

    def _choose(self) -> Choice | None:
        if self.choice is not None or not self.tuning.complete:
            return None
        self.choice = self.tuning.choice
        if self.choice.settings is not None:
            self._plan_replicates(self.choice.settings)
        return self.choice

    def _plan_replicates(self, settings: dict[str, Any]) -> None:
        self.replicates = self.arm_cell.replicates(settings)
        for run in self.replicates:
            outcome = self.read(run.key)
            if outcome is None:
                self._waiting.append(run)
            else:
                self._check_metric(run, outcome)
                self.results[run.key] = outcome

    def _metric(self, run: PlannedRun) -> str:
        metric = self.arm_cell.sweep.metric
        return metric.report if run.trial is None else metric.select

    def _check_metric(self, run: PlannedRun, outcome: RunOutcome) -> None:
        """A finished run without the metric means a wrong name in the sweep file: all others would miss it too."""
        name = self._metric(run)
        if outcome.outcome == "finished" and name not in outcome.metrics:
            split = name.partition("/")[0]
            known = ", ".join(sorted(metric for metric in outcome.metrics if metric.startswith(f"{split}/"))) or "none"
            sweep = self.arm_cell.sweep.name
            raise UserError(f"sweep {sweep}: metric.{split}: runs have no {name!r}; of this split they have: {known}")
