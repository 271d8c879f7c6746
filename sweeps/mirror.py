"""The driver's part of the MLflow mirror: store, experiment and parent runs exist before any worker starts.

All that takes MLflow is done in processes of their own: see ``sweeps.apart``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from experiments.errors import UserError
from experiments.paths import artifact_root, tracking_uri
from experiments.records import run_folder
from experiments.tracking import (
    StoreOutOfReach,
    ensure_experiment,
    ensure_parent,
    mirror_lock,
    prepare_store,
    sync,
    unsynced,
)
from sweeps.apart import apart
from sweeps.plan import Plan, PlannedRun


def experiment_tags(question: str, metric: dict[str, str]) -> dict[str, str]:
    """What MLflow's experiment says about its sweep; ``metric`` has select, report and direction."""
    names = ("select", "report", "direction")
    return {"mixlab.question": question, **{f"mixlab.metric.{name}": metric[name] for name in names}}


@dataclass
class SweepMirror:
    """Where the runs of a sweep are mirrored.

    experiment_id: "" where the store is out of reach: then nothing is mirrored before the end of the sweep.
    problem: what is to be said about the store, once; "" when all is well.
    """

    plan: Plan
    runs: Path
    uri: str
    experiment_id: str = ""
    parents: dict[tuple[str, str], str] = field(default_factory=dict)  # (arm, cell) -> parent run
    problem: str = ""
    _told: bool = False

    @classmethod
    def prepare(cls, plan: Plan, runs: Path) -> SweepMirror:
        """Create what is missing in the store, and close the runs that an earlier driver left RUNNING.

        :class:`UserError` where the store can never be used: then nothing at all has been created. One that is only
        out of reach now is no error: the trainings need none.
        """
        mirror = cls(plan, runs, tracking_uri(runs))
        try:
            mirror.experiment_id, mirror.parents = apart(mirror._prepare, f"tracking store of sweep {mirror.sweep}")
        except StoreOutOfReach as error:
            mirror.problem = unsynced.way_to_catch_up(str(error), mirror.sweep)
        return mirror

    @property
    def sweep(self) -> str:
        return self.plan.sweep.name

    def target(self, run: PlannedRun) -> dict[str, str] | None:
        """The fields of the worker's ``TrackingTarget``."""
        if not self.experiment_id:
            return None
        parent_id = self.parents[run.identity.arm, run.identity.cell]
        return {"uri": self.uri, "experiment_id": self.experiment_id, "parent_id": parent_id}

    def ended(self, run: PlannedRun) -> str:
        """What is to be said now that ``run`` has ended: the first time that the mirror is behind, else nothing."""
        folder = run_folder(self.runs, self.sweep, run.key)
        if not self.experiment_id:
            unsynced.mark(folder, "the store was out of reach")
        problem = unsynced.problem_of(folder)
        if not problem or self._told or self.problem:
            return ""
        self._told = True
        return unsynced.way_to_catch_up(problem, self.sweep)

    def is_behind(self) -> bool:
        return unsynced.any_unsynced(self.runs / self.sweep)

    def catch_up(self) -> str:
        """Bring runs up to date that a worker could not mirror; returns what went wrong, in words, or nothing."""

        def prepare_and_sync() -> None:
            experiment_id, _ = self._prepare()  # a server that is gone says so at once
            sync(self.uri, experiment_id, self.runs, self.sweep)

        try:
            apart(prepare_and_sync, f"mixlab sync {self.sweep}")
        except UserError as error:
            return unsynced.way_to_catch_up(str(error), self.sweep)
        return ""

    def _prepare(self) -> tuple[str, dict[tuple[str, str], str]]:
        """Ids of the experiment and of the parents, made where they are missing."""
        sweep, root = self.plan.sweep, artifact_root(self.runs)
        prepare_store(self.uri, root)
        tags = experiment_tags(sweep.question, sweep.metric.model_dump()) | {"mixlab.n_runs": str(self.plan.n_runs)}
        try:
            experiment_id = ensure_experiment(self.uri, sweep.name, root, tags)
            with mirror_lock(self.runs / sweep.name):
                parents = {
                    (arm_cell.arm, arm_cell.cell): ensure_parent(
                        self.uri,
                        experiment_id,
                        sweep=sweep.name,
                        arm=arm_cell.arm,
                        cell=arm_cell.cell,
                        factors=arm_cell.factors,
                        pattern=arm_cell.pattern,
                    )
                    for arm_cell in self.plan.arm_cells
                }
            sync(self.uri, experiment_id, self.runs, sweep.name, orphans_only=True)
        except (UserError, OSError) as error:  # it could be used a moment ago
            raise StoreOutOfReach(str(error)) from None
        return experiment_id, parents
