"""Bring MLflow up to date with the records on disk."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.records import RunRecord, read_json, read_metrics, read_sweep_runs
from experiments.tracking import mirror, schema
from experiments.tracking.client import all_runs, client_of, store_errors
from experiments.tracking.store import WAY_OUT, ensure_parent

if TYPE_CHECKING:
    from mlflow.entities import Run


@dataclass(frozen=True)
class SyncReport:
    """Records by what was done about their runs in MLflow."""

    n_created: int = 0
    n_updated: int = 0
    n_unchanged: int = 0


def sync(uri: str, experiment_id: str, runs: Path, sweep: str, *, running: Collection[str] = ()) -> SyncReport:
    """Make MLflow's runs say what the records of ``sweep`` under ``runs`` say; what is right already is left alone.

    A record without outcome was cut off: its run becomes KILLED, unless its key is among ``running``. Records that
    MLflow doesn't know get a run. A second call in a row changes nothing.

    Raises UserError where the store can't be used.
    """
    counts = {"created": 0, "updated": 0, "unchanged": 0}
    with store_errors(uri, WAY_OUT):
        client = client_of(uri)
        known: dict[str, Run] = {}
        for found in all_runs(client, experiment_id):
            known.setdefault(found.data.tags.get(schema.KEY, ""), found)
        for record in read_sweep_runs(runs, sweep):
            if record.identity.key in running:
                continue
            run = known.get(record.identity.key)
            if run is not None and _is_mirrored(run, record):
                counts["unchanged"] += 1
                continue
            parent_id = run.data.tags.get(schema.PARENT_RUN) if run else None
            opened, _ = mirror.open_run(
                client,
                experiment_id,
                record.identity,
                record.config,
                parent_id=parent_id or _parent(uri, experiment_id, record),
                tags=_git_tag(record),
                start_time_ms=min((row["time_ms"] for row in read_metrics(record.folder)), default=None),
            )
            mirror.mirror_record(client, opened, record.folder, record.outcome)
            counts["updated" if run else "created"] += 1
    return SyncReport(counts["created"], counts["updated"], counts["unchanged"])


def _is_mirrored(run: Run, record: RunRecord) -> bool:
    is_complete = run.data.tags.get(schema.MIRRORED) == mirror.fingerprint(record.folder, record.outcome)
    return is_complete and run.info.status == schema.status(record.outcome)


def _parent(uri: str, experiment_id: str, record: RunRecord) -> str:
    who = record.identity
    return ensure_parent(
        uri, experiment_id, sweep=who.sweep, arm=who.arm, cell=who.cell, factors=who.factors, pattern=who.pattern
    )


def _git_tag(record: RunRecord) -> dict[str, str]:
    environment = read_json(record.folder / "environment.json")
    git = environment.get("git") if isinstance(environment, dict) else None
    return {schema.GIT: git} if isinstance(git, str) else {}
