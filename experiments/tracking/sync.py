"""Bring MLflow up to date with the records on disk."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.records import RunRecord, read_json, read_sweep_runs
from experiments.run_lock import is_running
from experiments.tracking import mirror, schema, unsynced
from experiments.tracking.client import all_runs, client_of, store_errors
from experiments.tracking.store import WAY_OUT, ensure_parent

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

LOCK_FILE = ".mirror.lock"


@dataclass(frozen=True)
class SyncReport:
    """Records by what was done about their runs in MLflow. ``n_doubled``: further runs of a key that were deleted."""

    n_created: int = 0
    n_updated: int = 0
    n_unchanged: int = 0
    n_running: int = 0
    n_doubled: int = 0


def sync(
    uri: str,
    experiment_id: str,
    runs: Path,
    sweep: str,
    *,
    orphans_only: bool = False,
    on_progress: Callable[[int, int], None] = lambda n_done, n_records: None,
) -> SyncReport:
    """Make MLflow's runs say what the records of ``sweep`` under ``runs`` say; what is right already is left alone.

    A record without outcome was cut off: its run becomes KILLED, unless some process trains it now. Records that
    MLflow doesn't know get a run. A second call in a row changes nothing; one that was cut off is completed by the
    next. ``orphans_only``: only runs that MLflow shows as RUNNING though nobody trains them.

    Raises UserError where the store can't be used.
    """
    counts = {"created": 0, "updated": 0, "unchanged": 0, "running": 0}
    with store_errors(uri, WAY_OUT), mirror_lock(runs / sweep):
        client = client_of(uri)
        known, n_doubled = _runs_by_key(client, experiment_id)
        records = read_sweep_runs(runs, sweep)
        if orphans_only:
            records = [record for record in records if _shown_running(known.get(record.identity.key))]
        for n_done, record in enumerate(records):
            on_progress(n_done, len(records))
            counts[_sync_record(client, uri, experiment_id, record, known.get(record.identity.key))] += 1
        on_progress(len(records), len(records))
        if counts["created"]:
            # A call of a worker that was cut short may have got through meanwhile.
            n_doubled += _runs_by_key(client, experiment_id)[1]
    return SyncReport(**{f"n_{name}": n for name, n in counts.items()}, n_doubled=n_doubled)


@contextmanager
def mirror_lock(sweep_folder: Path) -> Iterator[None]:
    """One process at a time makes parent runs, and runs that MLflow lacks: two at once would make two of each."""
    sweep_folder.mkdir(parents=True, exist_ok=True)
    with open(sweep_folder / LOCK_FILE, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync_record(client: MlflowClient, uri: str, experiment_id: str, record: RunRecord, run: Run | None) -> str:
    """What was done, as a name of ``SyncReport``."""
    if is_running(record.folder):
        return "running"
    if run is not None and _is_mirrored(run, record):
        unsynced.unmark(record.folder)
        return "unchanged"
    parent_id = run.data.tags.get(schema.PARENT_RUN) if run else None
    mirror.bring_up_to_date(
        client,
        experiment_id,
        record,
        run,
        parent_id=parent_id or _parent(uri, experiment_id, record),
        tags=_git_tag(record),
    )
    unsynced.unmark(record.folder)
    return "updated" if run else "created"


def _runs_by_key(client: MlflowClient, experiment_id: str) -> tuple[dict[str, Run], int]:
    """The oldest run of each key; further ones are deleted, and counted."""
    known: dict[str, Run] = {}
    n_doubled = 0
    for run in all_runs(client, experiment_id):
        key = run.data.tags.get(schema.KEY, "")
        if key and key in known:
            client.delete_run(run.info.run_id)
            n_doubled += 1
        elif key:
            known[key] = run
    return known, n_doubled


def _shown_running(run: Run | None) -> bool:
    return run is not None and run.info.status == "RUNNING"


def _is_mirrored(run: Run, record: RunRecord) -> bool:
    is_complete = run.data.tags.get(schema.MIRRORED) == mirror.fingerprint(record.folder, record.outcome)
    return is_complete and run.info.status == schema.status(record.outcome)


def _parent(uri: str, experiment_id: str, record: RunRecord) -> str | None:
    if not (record.folder.parent / "sweep.json").exists():
        return None  # of `mixlab train`, not of a sweep
    who = record.identity
    return ensure_parent(
        uri, experiment_id, sweep=who.sweep, arm=who.arm, cell=who.cell, factors=who.factors, pattern=who.pattern
    )


def _git_tag(record: RunRecord) -> dict[str, str]:
    environment = read_json(record.folder / "environment.json")
    git = environment.get("git") if isinstance(environment, dict) else None
    return {schema.GIT: git} if isinstance(git, str) else {}
