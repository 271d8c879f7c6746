"""The driver's part of the MLflow mirror: store, experiment and parent runs exist before any worker starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.errors import UserError
from experiments.paths import artifact_root, tracking_uri
from sweeps.plan import Plan, PlannedRun


def open_store(runs: Path) -> None:
    """Make the store if it doesn't exist yet; :class:`UserError` where it can't be used."""
    from experiments.tracking import prepare_store

    prepare_store(tracking_uri(runs), artifact_root(runs))


@dataclass
class SweepMirror:
    """Where the runs of a sweep are mirrored."""

    uri: str
    experiment_id: str
    parents: dict[tuple[str, str], str]  # (arm, cell) -> parent run
    runs: Path
    sweep: str

    @classmethod
    def prepare(cls, plan: Plan, runs: Path) -> SweepMirror:
        """Create what is missing in the store, which :func:`open_store` has made."""
        from experiments.tracking import ensure_experiment, ensure_parent

        sweep, uri, root = plan.sweep, tracking_uri(runs), artifact_root(runs)
        tags = {
            "mixlab.question": sweep.question,
            "mixlab.metric.select": sweep.metric.select,
            "mixlab.metric.report": sweep.metric.report,
            "mixlab.metric.direction": sweep.metric.direction,
        }
        experiment_id = ensure_experiment(uri, sweep.name, root, tags)
        parents = {
            (arm_cell.arm, arm_cell.cell): ensure_parent(
                uri,
                experiment_id,
                sweep=sweep.name,
                arm=arm_cell.arm,
                cell=arm_cell.cell,
                factors=arm_cell.factors,
                pattern=arm_cell.pattern,
            )
            for arm_cell in plan.arm_cells
        }
        return cls(uri, experiment_id, parents, runs, sweep.name)

    def target(self, run: PlannedRun) -> dict[str, str]:
        """The fields of the worker's ``TrackingTarget``."""
        parent_id = self.parents[run.identity.arm, run.identity.cell]
        return {"uri": self.uri, "experiment_id": self.experiment_id, "parent_id": parent_id}

    def catch_up(self) -> str:
        """Bring runs up to date that a worker could not mirror; returns what went wrong, in words, or nothing."""
        from experiments.tracking import sync

        try:
            open_store(self.runs)  # a server that is gone says so at once
            sync(self.uri, self.experiment_id, self.runs, self.sweep)
        except UserError as error:
            return f"{error}; `mixlab sync {self.sweep}` catches up later"
        return ""
