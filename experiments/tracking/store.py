"""Make the tracking store, a sweep's experiment and its parent runs, before any worker starts.

Workers that meet a store which doesn't exist yet race to create it, and most of them lose: the driver
does this first.
"""

from __future__ import annotations

import os
import sqlite3
import urllib.parse
from pathlib import Path
from typing import Any

from experiments.errors import UserError, nearest
from experiments.tracking import schema
from experiments.tracking.client import all_runs, client_of, load_mlflow, one_line, shown, store_errors

SQL_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")
SERVER_SCHEMES = ("http", "https")
REACH_TIMEOUT_S = 5.0
WAY_OUT = "set MLFLOW_TRACKING_URI to another store, or unset it for a SQLite file among the runs"


class StoreOutOfReach(UserError):
    """The store is named well, but does not answer now: a server that is down, a database that is locked or full."""


def prepare_store(uri: str, artifact_root: str) -> None:
    """Create the store at ``uri`` where it doesn't exist, and check that it takes writing.

    A SQLite file is made complete under another name and then moved into place, so that nobody ever sees half of it.
    ``artifact_root`` (a URI) is where MLflow keeps files of its default experiment; a server decides for itself.

    Raises UserError for a URI that names no store, and a folder or file that can't be written; StoreOutOfReach for a
    server or a database that does not answer.
    """
    kind = _scheme(uri)
    if kind in SERVER_SCHEMES:
        _check_server(uri)
    elif kind == "sqlite":
        _prepare_sqlite(uri, artifact_root)
    else:
        _check_database(uri)
        with store_errors(uri, WAY_OUT):
            _create_tables(uri, artifact_root)


def ensure_experiment(uri: str, name: str, artifact_root: str, tags: dict[str, str]) -> str:
    """The id of the experiment ``name``, created or restored if it must be, with these ``tags``.

    Its artifacts lie in a folder of its own below ``artifact_root``; a server decides for itself.

    Raises UserError where the store can't be used.
    """
    location = None if _scheme(uri) in SERVER_SCHEMES else f"{artifact_root}/{urllib.parse.quote(name, safe='')}"
    with store_errors(uri, WAY_OUT):
        client = client_of(uri)
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                experiment = client.get_experiment(client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                experiment = client.get_experiment_by_name(name)  # another process may have been quicker
                if experiment is None:
                    raise error
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        for key, value in tags.items():
            if experiment.tags.get(key) != value:
                client.set_experiment_tag(experiment.experiment_id, key, value)
        return experiment.experiment_id


def ensure_parent(
    uri: str, experiment_id: str, *, sweep: str, arm: str, cell: str, factors: dict[str, Any], pattern: str
) -> str:
    """The id of the parent run of an arm and cell: the one that exists, or a new one, left FINISHED.

    Raises UserError where the store can't be used.
    """
    tags = schema.parent_tags(sweep, arm, cell, factors, pattern)
    with store_errors(uri, WAY_OUT):
        client = client_of(uri)
        # Names of arms and cells may hold quotes, which MLflow's filters can't: compared here instead.
        for run in all_runs(client, experiment_id, f"tags.`{schema.ROLE}` = '{schema.PARENT_ROLE}'"):
            if all(run.data.tags.get(name) == tags[name] for name in (schema.SWEEP, schema.ARM, schema.CELL)):
                break
        else:
            run = client.create_run(experiment_id, tags=tags)
        if run.info.status != "FINISHED":
            client.set_terminated(run.info.run_id, "FINISHED")
        return run.info.run_id


def probe_store(uri: str) -> str:
    """How the store at ``uri`` stands, in words, after asking it; creates and changes nothing.

    Raises UserError for a URI that names no store, one that can't be reached, and a file or folder that can't be
    written.
    """
    kind = _scheme(uri)
    if kind in SERVER_SCHEMES:
        _check_server(uri)
        return "server answers"
    if kind != "sqlite":
        _check_database(uri)
        return "database answers"
    path = sqlite_path(uri)
    assert path is not None
    if path.is_dir():
        raise UserError(f"tracking store {uri}: is a folder; name a file in it")
    if path.exists():
        _check_takes_writing(uri, path)
        return "exists and takes writing"
    folder = next(folder for folder in path.resolve().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"tracking store {uri}: can't be created, as {folder} can't be written; {WAY_OUT}")
    return "will be created by the first run"


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI, None for other kinds of store."""
    if _scheme(uri) != "sqlite":
        return None
    name = uri.partition("://")[2].removeprefix("/").partition("?")[0]
    if not name or name == ":memory:":
        raise UserError(f"tracking store {uri!r}: worker processes can't share a store in memory; give sqlite:///FILE")
    return Path(name)


def _scheme(uri: str) -> str:
    scheme, found, _ = uri.partition("://")
    kind = scheme.partition("+")[0]
    if found and kind in (*SQL_SCHEMES, *SERVER_SCHEMES):
        return kind
    hint = nearest(kind, (*SQL_SCHEMES, *SERVER_SCHEMES)) if found else ""
    raise UserError(f"tracking store {shown(uri)!r}: give sqlite:///FILE, http://HOST:PORT or a database URI{hint}")


def _check_server(uri: str) -> None:
    """One short request before MLflow's own, which keep trying for minutes."""
    import requests

    try:
        answer = requests.get(uri, timeout=REACH_TIMEOUT_S)
    except requests.RequestException as error:
        reason = type(error).__name__
        raise StoreOutOfReach(
            f"tracking store {shown(uri)}: server can't be reached ({reason}); start it, or {WAY_OUT}"
        ) from None
    if answer.status_code >= 500:
        raise StoreOutOfReach(
            f"tracking store {shown(uri)}: server answers {answer.status_code}; mend it, or {WAY_OUT}"
        )
    with store_errors(uri, f"check address and credentials, or {WAY_OUT}"):
        client_of(uri).search_experiments(max_results=1)


def _check_database(uri: str) -> None:
    """One connection before MLflow's own attempts, which go on for minutes."""
    import sqlalchemy
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError

    try:
        url = sqlalchemy.make_url(uri)
        patience = {"connect_timeout": int(REACH_TIMEOUT_S)} if url.get_backend_name() == "postgresql" else {}
        engine = sqlalchemy.create_engine(url, connect_args=patience)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        driver = "; pip install 'mixlab[postgres]'" if _scheme(uri) == "postgresql" else ""
        raise UserError(f"tracking store {shown(uri)}: {one_line(error)}{driver}, or {WAY_OUT}") from None
    try:
        engine.connect().close()
    except OperationalError as error:
        raise StoreOutOfReach(f"tracking store {shown(uri)}: {one_line(error.orig or error)}; {WAY_OUT}") from None
    finally:
        engine.dispose()


def _prepare_sqlite(uri: str, artifact_root: str) -> None:
    path = sqlite_path(uri)
    assert path is not None
    if path.is_dir():
        raise UserError(f"tracking store {uri}: is a folder; name a file in it, such as {uri.rstrip('/')}/mlflow.db")
    try:
        if path.exists():
            _check_sqlite_file(uri, path, artifact_root)
        else:
            _create_sqlite_file(path, artifact_root)
    except OSError as error:
        raise UserError(f"tracking store {uri}: can't be written: {error.strerror or error}; {WAY_OUT}") from None


def _check_sqlite_file(uri: str, path: Path, artifact_root: str) -> None:
    _check_takes_writing(uri, path)
    with store_errors(uri, f"move the file away or {WAY_OUT}"):
        _create_tables(uri, artifact_root)


def _check_takes_writing(uri: str, path: Path) -> None:
    try:
        connection = sqlite3.connect(path, timeout=REACH_TIMEOUT_S)
        try:
            connection.execute("BEGIN IMMEDIATE")  # needs what writing needs, and changes nothing
            connection.execute("SELECT 1 FROM sqlite_master").fetchone()
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.Error as error:
        passes = error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL)
        kind = StoreOutOfReach if passes else UserError
        raise kind(f"tracking store {uri}: {error}; {WAY_OUT}") from None


def _create_sqlite_file(path: Path, artifact_root: str) -> None:
    missing = [folder for folder in path.resolve().parents if not folder.exists()]
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
        _create_tables(f"sqlite:///{draft.resolve()}", artifact_root)
        _move_into_place(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        for folder in missing:  # the innermost first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    finally:
        draft.unlink(missing_ok=True)


def _move_into_place(draft: Path, path: Path) -> None:
    """Without ever replacing a store that another process made in the meantime."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return
    except OSError:  # a filesystem without hard links
        draft.rename(path)


def _create_tables(uri: str, artifact_root: str) -> None:
    load_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(uri, artifact_root).engine.dispose()
