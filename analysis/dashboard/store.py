"""MLflow's runs read in bulk from its tables, and kept while nothing changes.

MLflow's own search builds an object for every parameter, which takes seconds for 10,000 runs. Here the database makes
one JSON object of the tags of a run, and one of its parameters, and only what has changed is read again.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, or_, select
from sqlalchemy.engine import make_url

from analysis.dashboard import mlflow_private

# Runs that have ended are read again at most this often, for tags and metrics that are edited afterwards.
REREAD_S = 30.0
_AT_ONCE = 500  # ids in one IN (...)
# how a kind of database makes one JSON object of many rows
_JSON_OBJECT = {
    "sqlite": "json_group_object",
    "postgresql": "json_object_agg",
    "mysql": "json_objectagg",
    "mariadb": "json_objectagg",
}
METRIC_PREFIXES = ("report/", "select/", "cost/", "train/loss")


@dataclass(frozen=True)
class RunInfo:
    run_id: str
    status: str
    start_time: int | None
    end_time: int | None


@dataclass
class RunData:
    """``params`` is None until somebody asks for it; ``logged_ms`` is when one of the metrics was last logged."""

    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    params: dict[str, str] | None = None
    logged_ms: int = 0


@dataclass(frozen=True)
class StoredRun:
    """A run by the names of MLflow's own ``Run``; ``data.metrics`` holds the latest values of METRIC_PREFIXES only."""

    info: RunInfo
    data: RunData


@dataclass(frozen=True)
class StoredExperiment:
    """An experiment by the names of MLflow's own; ``state`` changes with its runs and tags."""

    experiment_id: str
    name: str
    tags: dict[str, str]
    creation_time: int
    state: tuple[Any, ...]


@dataclass
class _Kept:
    state: tuple[Any, ...]
    read_s: float
    writes: int
    runs: dict[str, StoredRun]


class Store:
    """The store at ``uri``, for reading only. Safe to use from several threads; ``with`` closes its connections."""

    def __init__(self, uri: str) -> None:
        self._engine = _read_only_engine(uri)
        self._json_object = _JSON_OBJECT[self._engine.dialect.name]
        self._tables = mlflow_private.tables()
        self._kept: dict[str, _Kept] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        # SQLite counts the writes of others per connection: this one stays open
        self._watch = self._engine.connect() if self._engine.dialect.name == "sqlite" else None
        self._listed: tuple[int, list[StoredExperiment]] | None = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.close()
        self._engine.dispose()

    def experiments(self) -> list[StoredExperiment]:
        """Experiments that are not deleted, newest first. Reads no run, only how many there are and when they ended."""
        if self._watch is None:
            return self._read_experiments()
        writes = self._writes()  # looked at before reading: what is written meanwhile is read at the next look
        if self._listed is None or self._listed[0] != writes:
            self._listed = (writes, self._read_experiments())
        return self._listed[1]

    def _read_experiments(self) -> list[StoredExperiment]:
        t = self._tables
        with self._engine.connect() as connection:
            found = connection.execute(
                select(t.experiments.c.experiment_id, t.experiments.c.name, t.experiments.c.creation_time)
                .where(t.experiments.c.lifecycle_stage == "active")
                .order_by(t.experiments.c.creation_time.desc(), t.experiments.c.experiment_id.desc())
            ).all()
            tags: dict[int, dict[str, str]] = {}
            for number, key, value in connection.execute(
                select(t.experiment_tags.c.experiment_id, t.experiment_tags.c.key, t.experiment_tags.c.value)
            ):
                tags.setdefault(number, {})[key] = value
            states = self._states(connection)
        return [
            StoredExperiment(
                experiment_id=str(number),
                name=name,
                tags=tags.get(number, {}),
                creation_time=created or 0,
                state=(tuple(sorted(tags.get(number, {}).items())), *states.get(number, ())),
            )
            for number, name, created in found
        ]

    def _states(self, connection: Connection) -> dict[int, tuple[Any, ...]]:
        """For every experiment what changes when one of its runs begins, logs, ends, is deleted or restored."""
        runs, latest = self._tables.runs, self._tables.latest_metrics
        states: dict[int, list[Any]] = {}
        kind = (runs.c.experiment_id, runs.c.lifecycle_stage, runs.c.status)
        counted = select(*kind, func.count(), func.max(runs.c.start_time), func.sum(runs.c.end_time)).group_by(*kind)
        for number, *state in connection.execute(counted.order_by(*kind)):
            states.setdefault(number, []).append(tuple(map(str, state)))
        running = connection.execute(
            select(runs.c.run_uuid, runs.c.experiment_id)
            .where(runs.c.status == "RUNNING", runs.c.lifecycle_stage == "active")
            .order_by(runs.c.run_uuid)
        ).all()
        experiment_of = dict(map(tuple, running))
        for start in range(0, len(running), _AT_ONCE):
            some = [run_id for run_id, _ in running[start : start + _AT_ONCE]]
            logged = select(latest.c.run_uuid, func.count(), func.max(latest.c.timestamp), func.sum(latest.c.step))
            for run_id, *state in connection.execute(
                logged.where(latest.c.run_uuid.in_(some)).group_by(latest.c.run_uuid).order_by(latest.c.run_uuid)
            ):
                states[experiment_of[run_id]].append((run_id, *map(str, state)))
        return {number: tuple(found) for number, found in states.items()}

    def runs(self, experiment: StoredExperiment, *, params: bool = False) -> list[StoredRun]:
        """All runs that are not deleted, oldest first; read again only where the experiment has changed."""
        with self._lock:
            lock = self._locks.setdefault(experiment.experiment_id, threading.Lock())
        with lock, self._engine.connect() as connection:  # a second reader waits for what the first one reads
            kept = self._kept.get(experiment.experiment_id)
            now, writes = time.monotonic(), self._writes()
            if kept is None or (now - kept.read_s > REREAD_S and writes != kept.writes):
                kept = _Kept(experiment.state, now, writes, self._read(connection, experiment.experiment_id, {}))
            elif kept.state != experiment.state:
                found = self._read(connection, experiment.experiment_id, kept.runs)
                kept = _Kept(experiment.state, kept.read_s, kept.writes, found)
            if params:
                lacking = {run_id: run.data for run_id, run in kept.runs.items() if run.data.params is None}
                for run_id, found in self._objects(connection, experiment.experiment_id, self._tables.params, lacking):
                    lacking[run_id].params = found
            self._kept[experiment.experiment_id] = kept
            return list(kept.runs.values())

    def version(self, experiment: StoredExperiment) -> tuple[Any, ...]:
        """What changes whenever the runs are read again."""
        self.runs(experiment)
        kept = self._kept[experiment.experiment_id]
        return kept.state, kept.read_s

    def _writes(self) -> int:
        """A number that changes when anybody has written to the store; elsewhere than in SQLite with time alone."""
        if self._watch is None:
            return int(time.monotonic() / REREAD_S)
        with self._lock:
            return self._watch.exec_driver_sql("PRAGMA data_version").scalar_one()

    def _read(self, connection: Connection, experiment_id: str, known: dict[str, StoredRun]) -> dict[str, StoredRun]:
        """The runs of an experiment; those of ``known`` that had ended, and ended when they did, are taken over."""
        runs, latest = self._tables.runs, self._tables.latest_metrics
        infos = [
            RunInfo(*row)
            for row in connection.execute(
                select(runs.c.run_uuid, runs.c.status, runs.c.start_time, runs.c.end_time)
                .where(runs.c.experiment_id == int(experiment_id), runs.c.lifecycle_stage == "active")
                .order_by(runs.c.start_time, runs.c.run_uuid)
            )
        ]
        found = {
            info.run_id: known[info.run_id]
            if info.status != "RUNNING" and info.run_id in known and known[info.run_id].info == info
            else StoredRun(info, RunData())
            for info in infos
        }
        fresh = {run_id: run.data for run_id, run in found.items() if run is not known.get(run_id)}
        for run_id, tags in self._objects(connection, experiment_id, self._tables.tags, fresh):
            fresh[run_id].tags = tags
        shown = or_(*(latest.c.key.startswith(prefix) for prefix in METRIC_PREFIXES))
        for which in self._conditions(experiment_id, latest, fresh):
            query = select(latest.c.run_uuid, latest.c.key, latest.c.value, latest.c.is_nan, latest.c.timestamp)
            for run_id, key, value, is_nan, time_ms in connection.execute(query.where(which, shown)):
                if run_id in fresh:
                    fresh[run_id].metrics[key] = math.nan if is_nan else value
                    fresh[run_id].logged_ms = max(fresh[run_id].logged_ms, time_ms)
        return found

    def _objects(
        self, connection: Connection, experiment_id: str, table: Any, of: Collection[str]
    ) -> Iterator[tuple[str, dict[str, str]]]:
        """For every run ``of`` an experiment its rows of ``table`` as a dictionary; {} where it has none."""
        missing = set(of)
        as_object = getattr(func, self._json_object)(table.c.key, table.c.value)
        for which in self._conditions(experiment_id, table, of):
            query = select(table.c.run_uuid, as_object).where(which).group_by(table.c.run_uuid)
            for run_id, found in connection.execute(query):
                if run_id in missing:
                    missing.remove(run_id)
                    yield run_id, json.loads(found) if isinstance(found, str) else found
        yield from ((run_id, {}) for run_id in missing)

    def _conditions(self, experiment_id: str, table: Any, of: Collection[str]) -> Iterator[Any]:
        """What selects the rows of runs ``of`` an experiment: by their ids where they are few, else all it has."""
        if len(of) > _AT_ONCE:
            runs = self._tables.runs
            yield table.c.run_uuid.in_(select(runs.c.run_uuid).where(runs.c.experiment_id == int(experiment_id)))
        elif of:
            yield table.c.run_uuid.in_(list(of))


class Page(list):
    """The one page that a search gives; by the name of MLflow's own ``PagedList``."""

    token: str | None = None


class VisibleStore:
    """A store as one user may see it, with the two methods of MLflow's client that reading a sweep needs.

    ``may_read`` gives those of some experiments' ids that the user may see.
    """

    def __init__(self, store: Store, may_read: Callable[[list[str]], list[str]]) -> None:
        self._store = store
        entries = store.experiments()
        allowed = set(may_read([entry.experiment_id for entry in entries]))
        self.experiments = {entry.experiment_id: entry for entry in entries if entry.experiment_id in allowed}

    def search_experiments(self, **_: Any) -> Page:
        return Page(self.experiments.values())

    def search_runs(self, experiment_ids: list[str], **_: Any) -> Page:
        return Page(run for number in experiment_ids for run in self.runs(number, params=True))

    def runs(self, experiment_id: str, *, params: bool = False) -> list[StoredRun]:
        return self._store.runs(self.experiments[experiment_id], params=params)

    def version(self, experiment_id: str) -> tuple[Any, ...]:
        return self._store.version(self.experiments[experiment_id])


def _read_only_engine(uri: str) -> Engine:
    if make_url(uri).get_backend_name() != "sqlite":
        engine = create_engine(uri, pool_pre_ping=True)
        return engine.execution_options(postgresql_readonly=True) if engine.name == "postgresql" else engine

    # any thread may use any connection: each is used by one at a time
    engine = create_engine(uri, connect_args={"check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _forbid_writing(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA query_only = ON")
        connection.execute("PRAGMA cache_size = -65536")  # KiB; the usual 2 MiB read every page many times

    return engine
