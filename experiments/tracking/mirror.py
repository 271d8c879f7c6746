"""One run in MLflow: find or open it, add points, close it. Every step may be repeated without doubling anything.

All functions raise what MLflow raises.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.records import RunIdentity, RunOutcome, RunRecord, finite, read_metrics
from experiments.tracking import schema
from experiments.tracking.client import all_runs
from experiments.tracking.schema import Point

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient


def open_run(
    client: MlflowClient,
    experiment_id: str,
    identity: RunIdentity,
    config: dict[str, Any],
    *,
    parent_id: str | None,
    tags: dict[str, str],
    run_id: str = "",
) -> tuple[Run, bool]:
    """The run of this key, RUNNING, with its tags and params; and whether it was there before.

    ``run_id`` is the run of an earlier try. Where it is not to be had any more, the run is found by its key, so that
    no key ever has two.
    """
    tags = run_tags(identity, parent_id, tags)
    found = _find_run(client, experiment_id, identity.key, run_id)
    run = found or client.create_run(experiment_id, tags=tags)
    if found:
        _set_tags(client, found, tags, stale=(schema.OUTCOME, schema.REASON, schema.MIRRORED))
        client.update_run(found.info.run_id, status="RUNNING")
    _log_params(client, run, schema.params(config))
    return run, found is not None


def run_tags(identity: RunIdentity, parent_id: str | None, tags: dict[str, str]) -> dict[str, str]:
    """The tags of a run from its start: ``tags``, who it is, and its parent."""
    parent = {schema.PARENT_RUN: parent_id} if parent_id else {}
    return {**schema.clipped_tags(tags), **schema.identity_tags(identity), **parent}


def log_points(client: MlflowClient, run_id: str, points: list[Point]) -> None:
    """Add points, as many at a time as MLflow takes. A point that is already there stays single."""
    from mlflow.entities import Metric

    for some in schema.chunks(points, schema.MAX_METRICS_PER_CALL):
        client.log_batch(run_id, metrics=[Metric(p.name, p.value, p.time_ms, p.step) for p in some])


def last_steps(client: MlflowClient, run: Run) -> dict[str, int]:
    """The last step of each metric of a run."""
    return {name: max(m.step for m in client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics}


def bring_up_to_date(
    client: MlflowClient,
    experiment_id: str,
    record: RunRecord,
    run: Run | None,
    *,
    parent_id: str | None,
    tags: dict[str, str],
) -> Run:
    """Make ``run`` say what the record says, and close it; returns it.

    A point of metrics.jsonl is there if its metric has its value at its step: a training that repeats steps after a
    restart records them anew, at another time. MLflow can't take points back: a run that has one which the record
    lacks (a try that was cut off went further, or elsewhere), or one twice, is deleted, and a new run takes its place.
    """
    logged = schema.row_points(read_metrics(record.folder))
    end_time_ms = final_time_ms(logged)
    final = schema.final_points(record.outcome, end_time_ms) if record.outcome else []
    wanted = {without_time(point): point for point in (*final, *logged)}
    there = [] if run is None else _points_of(client, run)
    if run is not None and _contradicts(there, wanted):
        client.delete_run(run.info.run_id)
        run, there = None, []
    tags = run_tags(record.identity, parent_id, tags)
    if run is None:
        start_time_ms = min((point.time_ms for point in logged), default=None)
        run = client.create_run(experiment_id, start_time=start_time_ms, tags=tags)
    else:
        _set_tags(client, run, tags, stale=() if record.outcome and record.outcome.reason else (schema.REASON,))
    _log_params(client, run, schema.params(record.config))
    given = {without_time(point) for point in there}
    log_points(client, run.info.run_id, [point for value, point in wanted.items() if value not in given])
    close_run(client, run.info.run_id, record.folder, record.outcome, end_time_ms)
    return run


def _points_of(client: MlflowClient, run: Run) -> list[Point]:
    histories = (client.get_metric_history(run.info.run_id, name) for name in run.data.metrics)
    return [Point(m.key, m.value, m.step, m.timestamp) for history in histories for m in history]


def _contradicts(there: list[Point], wanted: Collection[tuple[str, int, str]]) -> bool:
    given = {without_time(point) for point in there}
    return len(given) < len(there) or not given <= set(wanted)


def without_time(point: Point) -> tuple[str, int, str]:
    """What tells a final value from one that was logged before: as text, since NaN is not equal to itself."""
    return point.name, point.step, str(point.value)


def final_time_ms(logged: list[Point]) -> int:
    """A time just after the last point, so that a final value counts as the latest one at its step."""
    return max((p.time_ms for p in logged), default=time.time_ns() // 1_000_000 - 1) + 1


def close_run(
    client: MlflowClient, run_id: str, folder: Path, outcome: RunOutcome | None, end_time_ms: int | None = None
) -> None:
    """Tags of the outcome, the config as an artifact, MLflow's status; last of all the mark that nothing is missing."""
    from mlflow.entities import RunTag

    tags = [RunTag(name, value) for name, value in schema.outcome_tags(outcome).items()]
    client.log_batch(run_id, tags=tags)
    client.log_artifact(run_id, str(folder / "config.json"))
    client.set_terminated(run_id, schema.status(outcome), end_time_ms)
    client.set_tag(run_id, schema.MIRRORED, fingerprint(folder, outcome))


def fingerprint(folder: Path, outcome: RunOutcome | None) -> str:
    """Changes with the metrics or the outcome of a record."""
    values = asdict(outcome) if outcome else {}
    values.pop("mlflow_run_id", None)
    text = json.dumps([read_metrics(folder), finite(values)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _find_run(client: MlflowClient, experiment_id: str, key: str, run_id: str) -> Run | None:
    by_key = list(all_runs(client, experiment_id, f"tags.`{schema.KEY}` = '{key}'"))
    preferred = [run for run in by_key if run.info.run_id == run_id]
    return next(iter(preferred or by_key), None)


def _set_tags(client: MlflowClient, run: Run, tags: dict[str, str], *, stale: tuple[str, ...]) -> None:
    from mlflow.entities import RunTag

    for name in stale:
        if name in run.data.tags:
            client.delete_tag(run.info.run_id, name)
    client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def _log_params(client: MlflowClient, run: Run, params: dict[str, str]) -> None:
    """Those that are not there yet: MLflow refuses to change one."""
    from mlflow.entities import Param

    missing = [Param(name, value) for name, value in params.items() if name not in run.data.params]
    for some in schema.chunks(missing, schema.MAX_PARAMS_PER_CALL):
        client.log_batch(run.info.run_id, params=some)
