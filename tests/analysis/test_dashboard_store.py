"""What our pages read from MLflow's tables is what MLflow's own client gives, and stays so while runs go on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.dashboard import store as store_module
from analysis.dashboard.store import METRIC_PREFIXES, Store, VisibleStore
from analysis.runs import rows_from_mlflow_runs
from tests.analysis.big_store import write_big_store
from tests.stores import postgres


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("big")
    return write_big_store(folder, n_sweeps=2, n_arms=3, n_cells=4, n_seeds=3, n_trials=2)


def client_of(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def as_read(runs: Any) -> dict[str, Any]:
    def metrics(found: dict[str, float]) -> dict[str, Any]:
        return {n: "NaN" if math.isnan(v) else v for n, v in found.items() if n.startswith(METRIC_PREFIXES)}

    return {r.info.run_id: (r.info.status, r.data.tags, r.data.params, metrics(r.data.metrics)) for r in runs}


def same_as_the_client(store: Store, uri: str, name: str) -> bool:
    entry = next(entry for entry in store.experiments() if entry.name == name)
    ours = as_read(store.runs(entry, params=True))
    theirs = as_read(client_of(uri).search_runs([entry.experiment_id], max_results=5000))
    assert ours.keys() == theirs.keys()
    return ours == theirs


@pytest.fixture
def big_store(big: str) -> Iterator[Store]:
    with Store(big) as store:
        yield store


def test_a_store_in_bulk_is_the_store_run_by_run(big: str, big_store: Store) -> None:
    store = big_store
    entries = store.experiments()
    assert {entry.name for entry in entries} == {"Default", "big_00", "big_01"}
    assert same_as_the_client(store, big, "big_00")
    seen = VisibleStore(store, lambda ids: [n for n in ids if n != entries[0].experiment_id])
    assert entries[0].experiment_id not in seen.experiments
    saved, rows = rows_from_mlflow_runs(seen, "big_00")
    assert (saved, rows) == rows_from_mlflow_runs(client_of(big), "big_00")
    assert len(rows) == 3 * 4 * 5


@pytest.fixture(params=["sqlite", "postgresql"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    from experiments.tracking import prepare_store

    if request.param == "sqlite":
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
        prepare_store(uri, tmp_path.as_uri())
        yield uri
        return
    with postgres() as uri:
        prepare_store(uri, tmp_path.as_uri())
        yield uri


@pytest.fixture
def fresh_store(fresh: str) -> Iterator[Store]:
    with Store(fresh) as store:
        yield store


def test_what_changes_is_seen_at_the_next_look(fresh: str, fresh_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    client, store = client_of(fresh), fresh_store
    experiment = client.create_experiment("live", tags={"mixlab.metric.report": "report/accuracy"})
    names = [client.create_run(experiment, tags={"mixlab.arm": name}).info.run_id for name in "abc"]
    assert same_as_the_client(store, fresh, "live")
    client.log_metric(names[0], "select/accuracy", 0.5, step=1)
    assert same_as_the_client(store, fresh, "live")
    client.log_metric(names[0], "select/accuracy", float("nan"), step=2)
    client.log_metric(names[1], "select/accuracy", float("inf"), step=2)
    client.log_param(names[1], "odd", "'\"<b>\\ ü \n}")
    assert same_as_the_client(store, fresh, "live")
    client.set_terminated(names[0])
    client.create_run(experiment)
    assert same_as_the_client(store, fresh, "live")
    client.delete_run(names[2])
    assert same_as_the_client(store, fresh, "live")
    client.set_terminated(names[1])
    assert same_as_the_client(store, fresh, "live")
    client.set_tag(names[1], "note", "edited afterwards")
    monkeypatch.setattr(store_module, "REREAD_S", 1e-9)
    assert same_as_the_client(store, fresh, "live")
    client.delete_experiment(experiment)
    assert "live" not in {entry.name for entry in store.experiments()}


def test_nothing_is_read_again_while_nothing_changes(big_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store = big_store
    entry = store.experiments()[0]
    before = store.runs(entry)
    monkeypatch.setattr(store_module, "REREAD_S", 0.0)  # even then, as nobody has written
    monkeypatch.setattr(store, "_read", lambda *_: pytest.fail("read again"))
    entry = store.experiments()[0]
    assert all(a is b for a, b in zip(before, store.runs(entry), strict=True))


def test_our_pages_cannot_write_to_the_store(fresh_store: Store) -> None:
    from sqlalchemy.exc import DBAPIError

    with fresh_store._engine.connect() as connection, pytest.raises(DBAPIError, match=r"read-?only"):
        connection.exec_driver_sql("DELETE FROM experiments")
