"""The tuning of one arm-cell: which settings to try next, and which of the tried ones to take.

Records are the truth. The Optuna study beside them proposes settings for the adaptive sampler and lets Optuna's own
tools read a search; whenever a driver starts, it is brought in line with the records.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config import RESULTS_VERSION
from experiments.records import RunOutcome
from sweeps.definition import TUNING_SEED, SweepConfig
from sweeps.objectives import Constraint, direction_of, undominated, value_of
from sweeps.plan import ArmCell, PlannedRun
from sweeps.search import optuna_pruner, optuna_sampler
from sweeps.space import DESIGN_SEED, SearchSpace

if TYPE_CHECKING:
    import optuna

# A search may propose known settings so often, for each of its trials, before it has to do with fewer.
REPEATS_PER_TRIAL = 3
# Where ``Trial.set_constraint`` keeps a violation. A trial of a lost driver has no ``Trial`` to call it on: to make one
# would have the sampler propose again.
CONSTRAINT_ATTRIBUTE = "constraints:{}"
# Stands for a value that is not known: Optuna's attributes are JSON.
UNKNOWN_VIOLATION = 1e300
KEY, REPEATS = "mixlab.key", "mixlab.repeats"  # user attributes of Optuna's trials


@dataclass(frozen=True)
class Choice:
    """The settings taken for the replicates, or None and why there are none. ``value`` is the select metric's.

    ``front``: of a search with objectives, the trials that no other beats, with their ``values`` by name.
    """

    settings: dict[str, Any] | None
    value: float | None = None
    key: str = ""
    trial: int | None = None
    reason: str = ""
    front: tuple[dict[str, Any], ...] = ()


def select_value(outcome: RunOutcome, metric: str) -> float | None:
    """The select metric of a run that may win: finished, with a finite value. None for all others."""
    value = outcome.metrics.get(metric)
    if outcome.outcome != "finished" or value is None or not math.isfinite(value):
        return None
    return float(value)


def choose(
    results: list[tuple[PlannedRun, RunOutcome]], metric: str, direction: str, constraints: tuple[str, ...] = ()
) -> Choice:
    """The best trial by ``metric``; the first of equals. Diverged, failed and pruned trials never win.

    Neither does one that breaks a constraint, or whose constrained value is not known.
    """
    best: Choice | None = None
    n_outside = 0
    for run, outcome in results:
        value = select_value(outcome, metric)
        if value is None:
            continue
        if not kept(outcome, constraints):
            n_outside += 1
            continue
        if best is None or (value > best.value if direction == "maximize" else value < best.value):
            best = Choice(run.settings, value, run.key, run.trial)
    if best is not None:
        return best
    counts: dict[str, int] = {}
    for _, outcome in results:
        if select_value(outcome, metric) is not None:
            continue
        ended = f"without a finite {metric}" if outcome.outcome == "finished" else outcome.outcome
        counts[ended] = counts.get(ended, 0) + 1
    if n_outside:
        counts["outside the constraints"] = n_outside
    ends = ", ".join(f"{n} {ended}" for ended, n in counts.items())
    return Choice(None, reason=f"not run: none of {len(results)} tuning trials can be chosen ({ends})")


def kept(outcome: RunOutcome, constraints: tuple[str, ...]) -> bool:
    return all(Constraint.parse(text).violation(outcome) <= 0 for text in constraints)


def pareto_front(results: list[tuple[PlannedRun, RunOutcome]], sweep: SweepConfig) -> tuple[dict[str, Any], ...]:
    """The trials within the constraints that no other beats in all objectives; empty without objectives."""
    names, points, runs = sweep.search.objectives, [], []
    for run, outcome in results if names else ():
        values = [value_of(outcome, name) for name in names]
        if None not in values and kept(outcome, sweep.search.constraints):
            points.append(tuple(values))
            runs.append(run)
    directions = [direction_of(name, sweep.metric.direction) for name in names]
    return tuple(
        {
            "trial": runs[i].trial,
            "key": runs[i].key,
            "settings": runs[i].settings,
            "values": dict(zip(names, points[i], strict=True)),
        }
        for i in undominated(points, directions)
    )


@dataclass
class Tuning:
    """Trials of one arm-cell: taken one by one with :meth:`next_run`, ended with :meth:`tell`.

    ``read`` gives the final outcome recorded under a key, or None. ``runs`` are all distinct runs known so far and
    ``results`` those that have ended, by key.
    """

    arm_cell: ArmCell
    study: optuna.Study
    storage: Any
    read: Callable[[str], RunOutcome | None]
    runs: dict[str, PlannedRun] = field(default_factory=dict)
    results: dict[str, RunOutcome] = field(default_factory=dict)
    n_repeats: int = 0
    _asked: dict[str, int] = field(default_factory=dict)  # key -> number of Optuna's running trial
    _queued: set[str] = field(default_factory=set)  # keys that wait in the study
    _lost: dict[str, int] = field(default_factory=dict)  # key -> Optuna's trial that a lost driver was running

    @classmethod
    def open(cls, arm_cell: ArmCell, storage: Any, read: Callable[[str], RunOutcome | None]) -> Tuning:
        """The search as records and study leave it; trials that a lost driver was running go on."""
        import optuna

        study = optuna.create_study(
            storage=storage,
            study_name=f"{arm_cell.name} | {_digest(arm_cell, arm_cell.code)}",
            directions=[direction_of(name, arm_cell.sweep.metric.direction) for name in _objectives(arm_cell.sweep)],
            load_if_exists=True,
        )
        tuning = cls(arm_cell, study, storage, read)
        train = arm_cell.values["train"]
        study.pruner = optuna_pruner(arm_cell.sweep.search, train.get("eval_every", 0), train.get("max_steps"))
        tuning._renew_sampler()
        tuning._reconcile()
        return tuning

    @property
    def n_trials(self) -> int:
        """Distinct runs that the search will have made.

        Settings proposed twice are run once, and others are asked for; a space that seems used up ends the search.
        """
        n = self.arm_cell.n_trials
        return max(len(self.runs), n - max(0, self.n_repeats - REPEATS_PER_TRIAL * n))

    @property
    def complete(self) -> bool:
        return len(self.results) == self.n_trials

    @property
    def choice(self) -> Choice:
        assert self.complete
        sweep = self.arm_cell.sweep
        ordered = sorted(self.runs.values(), key=lambda run: run.trial)
        results = [(run, self.results[run.key]) for run in ordered]
        front = pareto_front(results, sweep)
        on_front = {point["key"] for point in front}
        # Of equals by the select metric, one that costs more for it is not on the front, and not chosen.
        results = [(run, outcome) for run, outcome in results if run.key in on_front] or results
        choice = choose(results, sweep.metric.select, sweep.metric.direction, sweep.search.constraints)
        return replace(choice, front=front)

    def next_run(self) -> PlannedRun | None:
        """The next trial to run; None while all are running or done."""
        if self._lost:
            key = next(iter(self._lost))
            self._asked[key] = self._lost.pop(key)
            return self.runs[key]
        while self._queued or len(self.runs) < self.n_trials:
            self._renew_sampler()
            trial = self.study.ask(_distributions(self.arm_cell.sweep.tune))
            key = trial.user_attrs.get(KEY)
            run = self.runs[key] if key else self.arm_cell.trial(len(self.runs), trial.params)
            if key is None and run.key in self.runs:
                self._close_repeat(trial, run)
                continue
            trial.set_user_attr(KEY, run.key)
            self.runs[run.key] = run
            self._queued.discard(run.key)
            self._asked[run.key] = trial.number
            outcome = self.read(run.key)
            if outcome is None:
                return run
            self.tell(run, outcome)
        return None

    def prunes(self, run: PlannedRun, step: int, value: float) -> bool:
        """Take the select metric that a running trial has at ``step``; whether the trial should end now."""
        if self.arm_cell.sweep.search.pruner == "none":
            return False
        trial_id = self._trial_id(self._asked[run.key])
        self.storage.set_trial_intermediate_value(trial_id, step, value)
        return self.study.pruner.prune(self.study, self.storage.get_trial(trial_id))

    def tell(self, run: PlannedRun, outcome: RunOutcome) -> None:
        """The end of a trial that :meth:`next_run` gave."""
        self.results[run.key] = outcome
        self._tell_study(self._asked.pop(run.key), outcome)

    def _renew_sampler(self) -> None:
        """Make what is proposed next a function of the trials so far, not of how many drivers have made them."""
        seed = (int(_digest(self.arm_cell), 16) + len(self.runs) + self.n_repeats) % 2**31
        self.study.sampler = optuna_sampler(self.arm_cell.sweep.search, self.arm_cell.n_trials, seed)

    def _reconcile(self) -> None:
        """Bring the study in line with plan and records, and queue what is left to run."""
        import optuna

        fail = optuna.trial.TrialState.FAIL
        for number, settings in enumerate(self.arm_cell.trial_settings):
            run = self.arm_cell.trial(number, settings)
            self.runs[run.key] = run
        told: set[str] = set()
        on_record: dict[str, RunOutcome | None] = {}  # each read once: a finished search has thousands

        def read(key: str) -> RunOutcome | None:
            if key not in on_record:
                on_record[key] = self.read(key)
            return on_record[key]

        for trial in self.study.get_trials(deepcopy=False):
            key = trial.user_attrs.get(KEY)
            if REPEATS in trial.user_attrs:
                self.n_repeats += 1
            elif key is not None and key not in self.runs:
                self.runs[key] = self.arm_cell.trial(len(self.runs), trial.params)
            outcome = read(key) if key is not None else None
            if trial.state.name == "WAITING":
                self._queued.add(key)
            elif trial.state.name != "RUNNING":
                told |= {key} if outcome is not None else set()
            elif outcome is None and key in self.runs and key not in self._lost:
                self._lost[key] = trial.number
            elif outcome is None or key in told:
                self.study.tell(trial.number, state=fail)
            else:
                self._tell_study(trial.number, outcome)
                told.add(key)
        for run in self.runs.values():
            outcome = read(run.key)
            if outcome is not None:
                self.results[run.key] = outcome
                if run.key not in told | self._queued:
                    self._add_told(run, outcome)
            elif run.key not in self._queued and run.key not in self._lost:
                self.study.enqueue_trial(run.settings, user_attrs={KEY: run.key})
                self._queued.add(run.key)

    def _add_told(self, run: PlannedRun, outcome: RunOutcome) -> None:
        """Enter a run that was made while the study did not know of it."""
        import optuna

        told = {"state": optuna.trial.TrialState.COMPLETE, **self._told(outcome)}
        distributions = _distributions(self.arm_cell.sweep.tune)
        attributes = {"user_attrs": {KEY: run.key}, "constraints": self._violations(outcome)}
        self.study.add_trial(
            optuna.create_trial(params=run.settings, distributions=distributions, **attributes, **told)
        )

    def _tell_study(self, number: int, outcome: RunOutcome) -> None:
        for text, violation in self._violations(outcome).items():
            self.storage.set_trial_system_attr(self._trial_id(number), CONSTRAINT_ATTRIBUTE.format(text), violation)
        self.study.tell(number, **self._told(outcome))

    def _trial_id(self, number: int) -> int:
        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study_id, number)

    def _violations(self, outcome: RunOutcome) -> dict[str, float]:
        constraints = self.arm_cell.sweep.search.constraints
        return {text: min(Constraint.parse(text).violation(outcome), UNKNOWN_VIOLATION) for text in constraints}

    def _told(self, outcome: RunOutcome) -> dict[str, Any]:
        """Optuna's words for an outcome."""
        import optuna

        names = _objectives(self.arm_cell.sweep)
        values = [value_of(outcome, name) for name in names]
        if None not in values:
            return {"values": values}
        if outcome.outcome == "failed" or len(names) > 1:
            return {"state": optuna.trial.TrialState.FAIL}
        # Not FAIL, which the sampler leaves out of account: it would propose settings that diverge again.
        return {"state": optuna.trial.TrialState.PRUNED}

    def _close_repeat(self, trial: optuna.Trial, run: PlannedRun) -> None:
        """Settings that are known already: the trial gets their result, or none while they are being run."""
        import optuna

        trial.set_user_attr(REPEATS, run.key)
        self.n_repeats += 1
        outcome = self.results.get(run.key)
        if outcome:
            self._tell_study(trial.number, outcome)
        else:
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


class _HeldLock:
    """The journal's lock, always held: the driver has locked the whole sweep. A killed one leaves none behind."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def open_journal(path: Path) -> Any:
    """Optuna storage in a journal file. A last line that a killed driver left torn is cut off first."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_HeldLock()))


def _objectives(sweep: SweepConfig) -> tuple[str, ...]:
    return sweep.search.objectives or (sweep.metric.select,)


def _distributions(spaces: dict[str, SearchSpace]) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for path, space in spaces.items():
        if space.choice is not None:
            found[path] = CategoricalDistribution(space.choice)
        elif space.int_uniform is not None:
            found[path] = IntDistribution(*space.int_uniform)
        else:
            found[path] = FloatDistribution(*space.bounds, log=space.log_uniform is not None)
    return found


def _digest(arm_cell: ArmCell, code: dict[str, str] | None = None) -> str:
    """Tells apart searches of the same name: an edited sweep file starts a new study, and so does edited ``code``.

    Without code it seeds the sampler: what is proposed first does not hang on how a layer is written.
    """
    sweep = arm_cell.sweep
    spaces = {path: space.model_dump(exclude_unset=True) for path, space in sweep.tune.items()}
    parts = [
        RESULTS_VERSION,
        DESIGN_SEED,
        TUNING_SEED,
        sweep.search.model_dump(),
        sweep.metric.model_dump(),
        arm_cell.n_trials,
    ]
    text = json.dumps([*parts, spaces, arm_cell.values, *([code] if code else [])], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
