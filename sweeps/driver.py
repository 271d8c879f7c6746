"""The driver: one process that owns a sweep, decides what runs next, and can be started again at any time."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType

from experiments.errors import UserError
from experiments.records import (
    FINAL_OUTCOMES,
    OUT_OF_MEMORY,
    RunOutcome,
    clear_temporaries,
    read_json,
    read_outcome,
    read_run,
    run_folder,
    tidy_run,
    write_identity,
    write_outcome,
)
from experiments.tracking.unsynced import any_unsynced
from sweeps import kept_plan
from sweeps.definition import SweepConfig
from sweeps.events import Chosen, Note, RunEnded, RunProgress, RunRetried, RunStarted, SweepEnded, SweepStarted
from sweeps.executor import (
    STALL_PATIENCE_S,
    TARGET,
    Ended,
    Executor,
    ExecutorEvent,
    Job,
    Lost,
    Reported,
    Started,
)
from sweeps.live import View
from sweeps.lock import driver_lock
from sweeps.mirror import SweepMirror
from sweeps.places import Wanted, place_for
from sweeps.plan import Plan, PlannedRun
from sweeps.planning import planned
from sweeps.progress import ArmCellProgress
from sweeps.pruning import ask_to_prune, asked_to_prune, forget_pruning
from sweeps.resources import require_gpus, require_sense
from sweeps.saved import SavedSweep, write_saved
from sweeps.tuning import Tuning, open_journal

MAX_ATTEMPTS = 2
# Of a run whose worker somebody kills: the run is not to blame, but there is an end to that too.
MAX_KILLED_ATTEMPTS = 10
POLL_S = 0.2
# Workers get this long to save their checkpoints, then they are killed: 5 s after Ctrl-C all is over, the end of this
# process included.
SAVE_PATIENCE_S = 3.0

INTERRUPTED_EXIT_CODE = 130


@dataclass(frozen=True)
class SweepResult:
    """All runs of the plan counted by outcome, with ``not_run`` and ``missing``; whether it was interrupted."""

    outcomes: dict[str, int]
    interrupted: bool

    @property
    def exit_code(self) -> int:
        """0: every run has its result, divergence included; 1: some failed; 130: interrupted."""
        if self.interrupted:
            return INTERRUPTED_EXIT_CODE
        return 1 if self.outcomes.get("failed") else 0


@dataclass
class StopSignals:
    """Counts SIGINT and SIGTERM. The first ends the sweep in order, a second at once."""

    count: int = 0

    @contextmanager
    def installed(self) -> Iterator[StopSignals]:
        def on_signal(number: int, frame: FrameType | None) -> None:
            self.count += 1

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_sweep(
    sweep: SweepConfig,
    runs: Path,
    view: View,
    *,
    n_workers: int | None = None,
    gpus: tuple[str, ...] | None = None,
    per_gpu: int | None = None,
    ray: str | None = None,
    stall_s: float = STALL_PATIENCE_S,
    plugins: tuple[str, ...] = (),
    tracked: bool = True,
    retry_failed: bool = False,
    target: str = TARGET,
) -> SweepResult:
    """Run what is missing of a sweep, to the end or to the first Ctrl-C.

    Raises :class:`UserError` before anything is created when the plan is not sound, and when another driver runs it.
    """
    for option, value in (("--workers", n_workers), ("--per-gpu", per_gpu)):
        if value is not None and value < 1:
            raise UserError(f"{option}: at least 1 is needed, got {value}")
    if not stall_s >= 0:
        raise UserError(f"--stall-after: seconds of silence, or 0 for no limit, got {stall_s:g}")
    folder = runs / sweep.name
    found = planned(sweep, folder, plugins)
    require_sense(found.plan, n_workers, gpus, per_gpu, ray)
    if ray is None:
        require_gpus(gpus, per_gpu, found.gpus)
    mirror = None
    if tracked and not (folder / "sweep.json").exists():
        # Before anything else is created: a store that can't be used leaves no trace of a new sweep.
        mirror = SweepMirror.prepare(found.plan, runs)
    with driver_lock(folder) as was_lost:
        tidy(folder)
        kept_plan.keep(folder, found.basis, found.plan, found.gpus)
        if retry_failed:
            _reopen([path.parent for path in sorted(folder.glob("*/outcome.json"))], "failed")
        if sweep.search.pruner == "none":
            _reopen(
                asked_to_prune(folder), "pruned"
            )  # the end of a search that had a pruner, but no result of this one
        edited = edited_since(folder, found.plan.code)
        n_threads_before = threads_before(folder)
        stop = StopSignals()
        driver = Driver(found.plan, runs, view, stop)
        # A finished sweep whose last driver ended in order, and of which nothing has been edited, is all in MLflow.
        is_open = driver.n_missing or was_lost or found.basis or any_unsynced(folder)
        if tracked and mirror is None and is_open:
            mirror = SweepMirror.prepare(found.plan, runs)
        driver.mirror = mirror
        wanted = Wanted(n_workers, gpus, per_gpu, ray)
        options = {"plugins": plugins, "target": target, "patience_s": stall_s}
        with stop.installed(), place_for(found, wanted, driver.n_missing, folder, **options) as place, view:
            if mirror is not None and mirror.problem:
                view.show(Note(mirror.problem))
            if edited:
                view.show(
                    Note(f"edited since the last start: {', '.join(edited)}; runs that depend on it are run again")
                )
            if driver.n_done and n_threads_before not in (0, sweep.threads):
                view.show(
                    Note(
                        f"its runs have had threads={n_threads_before} so far, those to come have {sweep.threads}: "
                        "the last bits of their results may differ, and their timings can't be compared"
                    )
                )
            result = driver.run(place.executor, place.n_workers)
        # A lost driver's last workers may have written their records, and had no time to mirror them.
        is_behind = mirror is not None and (was_lost or driver.has_unmirrored or mirror.is_behind())
        if is_behind and not result.interrupted and (problem := mirror.catch_up()):
            view.show(Note(problem))
        return result


@dataclass
class Driver:
    """The state of one start of a sweep."""

    plan: Plan
    runs: Path
    view: View
    stop: StopSignals
    mirror: SweepMirror | None = None
    arm_cells: list[ArmCellProgress] = field(default_factory=list)
    running: dict[str, tuple[PlannedRun, ArmCellProgress]] = field(default_factory=dict)
    again: list[tuple[PlannedRun, ArmCellProgress]] = field(default_factory=list)
    # Runs that had no memory beside others: each is tried once more, alone, when there is nothing else to start.
    alone: list[tuple[PlannedRun, ArmCellProgress]] = field(default_factory=list)
    lone_key: str | None = None
    n_slots: int = 1
    attempts: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)  # attempts that somebody ended from outside
    has_unmirrored: bool = False  # runs whose end their worker may not have told MLflow, nor marked as untold

    def __post_init__(self) -> None:
        sweep = self.plan.sweep
        journal = open_journal(self.folder / "optuna.journal") if sweep.tune else None
        for arm_cell in self.plan.arm_cells:
            tuning = Tuning.open(arm_cell, journal, self.final_outcome) if sweep.tune else None
            self.arm_cells.append(ArmCellProgress(arm_cell, tuning, self.final_outcome))
        self.save()

    @property
    def folder(self) -> Path:
        return self.runs / self.plan.sweep.name

    @property
    def n_runs(self) -> int:
        return sum(arm_cell.n_runs for arm_cell in self.arm_cells)

    @property
    def n_done(self) -> int:
        return sum(arm_cell.n_done for arm_cell in self.arm_cells)

    @property
    def n_missing(self) -> int:
        return self.n_runs - self.n_done

    def run(self, make_executor: Callable[[], Executor], n_workers: int) -> SweepResult:
        started = time.monotonic()
        self.n_slots = n_workers
        self._show_start(n_workers)
        if self.n_missing:
            executor = make_executor()
            try:
                self._loop(executor)
                self._wind_up(executor)
            except BaseException:
                self._save_states(executor, lambda event: None)
                raise
            finally:
                executor.close()
        result = SweepResult(self._outcomes(), interrupted=bool(self.stop.count) and self.n_missing > 0)
        wall_s = time.monotonic() - started
        self.view.show(SweepEnded(self.plan.sweep.name, result.interrupted, wall_s, result.outcomes))
        return result

    def final_outcome(self, key: str) -> RunOutcome | None:
        """The outcome on disk, where it stands as a result."""
        outcome = read_outcome(run_folder(self.runs, self.plan.sweep.name, key))
        return outcome if outcome is not None and outcome.outcome in FINAL_OUTCOMES else None

    def save(self) -> None:
        """Write sweep.json: the plan as far as it is known."""
        sweep = self.plan.sweep
        choices = {arm_cell.arm_cell.name: arm_cell.saved_choice() for arm_cell in self.arm_cells}
        n_trials = self.plan.arm_cells[0].n_trials
        saved = SavedSweep(
            name=sweep.name,
            question=sweep.question,
            metric=sweep.metric.model_dump(),
            budget={**sweep.budget.model_dump(exclude_none=True), "tune_trials": n_trials},
            arms=self.plan.patterns,
            cells=self.plan.cells,
            seeds=list(sweep.seeds),
            tune={path: space.model_dump(exclude_unset=True) for path, space in sweep.tune.items()},
            runs=[run for arm_cell in self.arm_cells for run in arm_cell.saved_runs()],
            chosen={name: choice for name, choice in choices.items() if choice is not None},
            match=self.plan.match_json(),
            code=self.plan.code,
            n_threads=sweep.threads,
            definition=sweep.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={"experiment"}),
        )
        write_saved(self.runs, saved)

    def _loop(self, executor: Executor) -> None:
        while not self.stop.count:
            self._fill(executor)
            if not self.running and not self.again and not self.alone and self.n_missing == 0:
                return
            for event in executor.poll(POLL_S):
                self._handle(event)
            self.view.tick()

    def _fill(self, executor: Executor) -> None:
        while executor.n_free and self.lone_key is None and (found := self._next()) is not None:
            self._submit(executor, *found)
        if executor.n_free and self.alone and not self.running:
            found = self.alone.pop(0)
            self.lone_key = found[0].key
            self._submit(executor, *found)

    def _submit(self, executor: Executor, run: PlannedRun, arm_cell: ArmCellProgress) -> None:
        self.running[run.key] = (run, arm_cell)
        self.attempts[run.key] += 1
        executor.submit(self._job(run))

    def _next(self) -> tuple[PlannedRun, ArmCellProgress] | None:
        """Arm-cells in order: an early one's replicates come before a late one's tuning.

        But for as many replicates as there are slots: those fill them while a last search waits for its last trials.
        When all searches are over, the longest come first, so that all slots end at about the same time.
        """
        if self.again:
            return self.again.pop(0)
        order = self.arm_cells
        few = sum(arm_cell.n_waiting for arm_cell in order) <= self.n_slots
        if self.n_slots > 1 and (few or not any(arm_cell.tunes for arm_cell in order)):
            order = sorted(order, key=lambda it: (False, 0.0) if it.tunes else (True, -it.expected_s))
        for arm_cell in order:
            chosen_before = arm_cell.choice
            run = arm_cell.next_run()
            if arm_cell.choice is not chosen_before:
                self.save()
                self._show_choice(arm_cell)
            if run is not None:
                if run.trial is not None and not arm_cell.arm_cell.trial_settings:
                    self.save()  # a trial that the sampler has just proposed
                return run, arm_cell
        return None

    def _job(self, run: PlannedRun) -> Job:
        tracking = self.mirror.target(run) if self.mirror is not None else None
        return Job(run.key, asdict(run.identity), run.config.resolved(), str(self.runs.resolve()), tracking)

    def _handle(self, event: ExecutorEvent) -> None:
        run, arm_cell = self.running[event.key]
        identity = run.identity
        if isinstance(event, Started):
            shown = (identity.key, identity.arm, identity.cell, identity.role, identity.seed, run.trial, event.worker)
            self.view.show(RunStarted(*shown))
        elif isinstance(event, Reported):
            shown = (identity.key, identity.arm, identity.cell, event.worker, event.step, event.n_steps, event.metrics)
            self.view.show(RunProgress(*shown, event.note))
            if event.evaluated and (reason := arm_cell.reason_to_prune(run, event.step, event.metrics)):
                ask_to_prune(run_folder(self.runs, identity.sweep, run.key), reason)
        elif isinstance(event, (Ended, Lost)):
            self._end(run, arm_cell, event)

    def _end(self, run: PlannedRun, arm_cell: ArmCellProgress, event: Ended | Lost) -> None:
        if isinstance(event, Ended) and event.halt:
            name = run.identity.sweep
            kept_plan.forget(self.folder)
            raise UserError(f"sweep {name}: {event.halt}")
        del self.running[run.key]
        if self.mirror is not None and (behind := self.mirror.ended(run)):
            self.view.show(Note(behind))
        was_alone = self.lone_key == run.key or self.n_slots == 1
        self.lone_key = None if self.lone_key == run.key else self.lone_key
        if isinstance(event, Lost):
            tidy_run(run_folder(self.runs, run.identity.sweep, run.key))
        outcome = self.final_outcome(run.key)
        self.has_unmirrored |= isinstance(event, Lost) or outcome is None or outcome.outcome == "failed"
        if outcome is None and self.stop.count:
            return  # killed, with or without a checkpoint: the next start goes on with it
        if outcome is not None and no_memory(outcome) and not was_alone and self._own_attempts(run) < MAX_ATTEMPTS:
            reopen(run_folder(self.runs, run.identity.sweep, run.key), outcome)
            self.alone.append((run, arm_cell))
            reason = f"{outcome.reason}; it is tried once more, alone"
            self.view.show(RunRetried(run.key, run.identity.arm, run.identity.cell, event.worker, reason))
            return
        if outcome is None:
            reason = event.reason if isinstance(event, Lost) else "it ended without a result"
            from_outside = isinstance(event, Lost) and event.from_outside
            self.kills[run.key] += from_outside
            n_attempts = self.kills[run.key] if from_outside else self._own_attempts(run)
            if n_attempts < (MAX_KILLED_ATTEMPTS if from_outside else MAX_ATTEMPTS):
                # The system may have ended it for want of memory: without neighbours it may have enough.
                (self.again if was_alone or from_outside else self.alone).append((run, arm_cell))
                self.view.show(RunRetried(run.key, run.identity.arm, run.identity.cell, event.worker, reason))
                return
            outcome = self._record_lost(run, f"{reason}, in each of {n_attempts} attempts")
        choice = arm_cell.record(run, outcome)
        self._show_end(run, arm_cell, outcome, event.worker, self.n_done, self.n_runs)
        if choice is not None:
            self.save()
            self._show_choice(arm_cell)

    def _own_attempts(self, run: PlannedRun) -> int:
        """Attempts of which the run itself brought about the end."""
        return self.attempts[run.key] - self.kills[run.key]

    def _record_lost(self, run: PlannedRun, reason: str) -> RunOutcome:
        """The result of a run that took its worker with it every time."""
        folder = run_folder(self.runs, run.identity.sweep, run.key)
        if read_run(folder) is None:
            write_identity(folder, run.identity, run.config.resolved())
        outcome = RunOutcome("failed", f"{reason}; see {folder / 'log.txt'}")
        write_outcome(folder, outcome)
        return outcome

    def _wind_up(self, executor: Executor) -> None:
        """After Ctrl-C, have the runs that still go on save their state."""
        if not self.running:
            return
        n = len(self.running)
        self.view.show(
            Note(f"interrupted: {n} running {'training saves its' if n == 1 else 'trainings save their'} state")
        )
        self._save_states(executor, self._handle)
        for run, _ in self.running.values():
            folder = run_folder(self.runs, run.identity.sweep, run.key)
            if read_run(folder) is not None and read_outcome(folder) is None:
                write_outcome(folder, RunOutcome("killed", "it did not stop in time; its last checkpoint stands"))

    def _save_states(self, executor: Executor, handle: Callable[[ExecutorEvent], None]) -> None:
        """Interrupt all runs, and wait for as long as a user can be asked to; a second signal ends the waiting."""
        asked_before = self.stop.count
        executor.interrupt()
        deadline = time.monotonic() + SAVE_PATIENCE_S
        while executor.busy and time.monotonic() < deadline and self.stop.count == asked_before:
            for event in executor.poll(min(POLL_S, max(0.0, deadline - time.monotonic()))):
                handle(event)
            self.view.tick()

    def _outcomes(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for arm_cell in self.arm_cells:
            counts.update(arm_cell.outcomes())
        counts["not_run"] = sum(arm_cell.n_not_run for arm_cell in self.arm_cells)
        counts["missing"] = self.n_missing
        return {name: n for name, n in counts.items() if n}

    def _show_start(self, n_workers: int) -> None:
        sweep, metric = self.plan.sweep, self.plan.sweep.metric
        n_done, n_runs = self.n_done, self.n_runs
        self.view.show(
            SweepStarted(
                sweep=sweep.name,
                question=sweep.question,
                count=self.plan.count(),
                n_runs=n_runs,
                n_done=n_done,
                n_workers=n_workers,
                direction=metric.direction,
                select=metric.select,
                report=metric.report,
            )
        )
        for arm_cell in self.arm_cells:
            done = {**(arm_cell.tuning.results if arm_cell.tuning else {}), **arm_cell.results}
            known = {
                **(arm_cell.tuning.runs if arm_cell.tuning else {}),
                **{run.key: run for run in arm_cell.replicates},
            }
            for key, outcome in done.items():
                self._show_end(known[key], arm_cell, outcome, None, n_done, n_runs)
            if arm_cell.tuning is not None and arm_cell.choice is not None:
                self._show_choice(arm_cell)

    def _show_end(
        self,
        run: PlannedRun,
        arm_cell: ArmCellProgress,
        outcome: RunOutcome,
        worker: int | None,
        n_done: int,
        n_runs: int,
    ) -> None:
        identity = run.identity
        self.view.show(
            RunEnded(
                key=run.key,
                arm=identity.arm,
                cell=identity.cell,
                role=identity.role,
                seed=identity.seed,
                trial=run.trial,
                outcome=outcome.outcome,
                reason=outcome.reason,
                value=arm_cell.value(run, outcome),
                wall_s=outcome.wall_s,
                n_done=n_done,
                n_runs=n_runs,
                worker=worker,
            )
        )

    def _show_choice(self, arm_cell: ArmCellProgress) -> None:
        choice = arm_cell.choice
        self.view.show(
            Chosen(arm_cell.arm_cell.arm, arm_cell.arm_cell.cell, choice.settings, choice.value, choice.reason)
        )


def tidy(folder: Path) -> None:
    """Do what a lost driver and its workers have left undone."""
    clear_temporaries(folder)
    for path in folder.iterdir():
        if path.is_dir():
            tidy_run(path)


def edited_since(folder: Path, code: dict[str, str]) -> list[str]:
    """Files whose code runs on record depend on, and that say something else now."""
    saved = read_json(folder / "sweep.json")
    before = saved.get("code", {}) if isinstance(saved, dict) else {}
    return sorted(name for name in before.keys() & code.keys() if before[name] != code[name])


def threads_before(folder: Path) -> int:
    """CPU threads that runs had when the sweep was last started; 0: not known."""
    saved = read_json(folder / "sweep.json")
    return saved.get("n_threads", 0) if isinstance(saved, dict) else 0


def _reopen(folders: list[Path], ended: str) -> None:
    """Let those of the runs that ended in a certain way be tried again. Their MLflow run and checkpoint stay theirs."""
    for folder in folders:
        outcome = read_outcome(folder)
        if outcome is not None and outcome.outcome == ended:
            forget_pruning(folder)
            reopen(folder, outcome)


def reopen(folder: Path, outcome: RunOutcome) -> None:
    """Let a run be tried again."""
    write_outcome(folder, replace(outcome, outcome="killed", reason=f"tried again after: {outcome.reason}"))


def no_memory(outcome: RunOutcome) -> bool:
    return outcome.outcome == "failed" and outcome.reason.startswith(OUT_OF_MEMORY)
