"""The MLflow mirror, on real SQLite stores."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.errors import UserError
from experiments.records import RunIdentity, RunOutcome, finite, run_folder, write_identity, write_outcome
from experiments.run_lock import run_lock
from experiments.tracking import RunTracker, SyncReport, ensure_experiment, ensure_parent, prepare_store, schema, sync
from experiments.tracking import run_tracker as run_tracker_module
from experiments.tracking.client import client_of
from experiments.tracking.mirror import log_points
from experiments.tracking.store import _move_into_place
from experiments.tracking.unsynced import problem_of

CONFIG = {"model": {"pattern": "softmax", "d_model": 8}, "task": {"mixture": [[1, 2], [3, 4]]}, "train": {"lr": 1e-3}}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    prepare_store(f"sqlite:///{path}", path.with_name("artifacts").as_uri())
    return path


class Store:
    """A store of its own, an experiment in it, and the records beside."""

    def __init__(self, folder: Path, empty_store: Path) -> None:
        self.path, self.runs = folder / "mlflow.db", folder / "runs"
        shutil.copy(empty_store, self.path)
        self.uri = f"sqlite:///{self.path}"
        self.artifacts = (folder / "artifacts").as_uri()
        self.experiment_id = ensure_experiment(self.uri, "sweep", self.artifacts, {"question": "which?"})
        self.client = client_of(self.uri)
        self.trackers: list[RunTracker] = []

    def identity(self, key: str = "k1") -> RunIdentity:
        return RunIdentity(key, "sweep", 'it\'s "fast"', "n=4", {"task.n_pairs": 4}, "replicate", 3, "softmax | pkm@1")

    def started(self, key: str = "k1", parent_id: str | None = None) -> RunTracker:
        """A tracker whose run is open."""
        tracker = self.tracker(key, parent_id)
        tracker.start()
        until(lambda: tracker.run_id)
        return tracker

    def tracker(self, key: str = "k1", parent_id: str | None = None) -> RunTracker:
        tracker = RunTracker(
            self.uri, self.experiment_id, self.identity(key), CONFIG, parent_id=parent_id, tags={"mixlab.git": "abc"}
        )
        self.trackers.append(tracker)
        return tracker

    def record(self, rows: list[dict], outcome: RunOutcome | None, key: str = "k1") -> Path:
        folder = run_folder(self.runs, "sweep", key)
        write_identity(folder, self.identity(key), CONFIG)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(finite(row)) + "\n" for row in rows))
        if outcome is not None:
            write_outcome(folder, outcome)
        return folder

    def run_of(self, key: str = "k1"):
        (run,) = self.client.search_runs([self.experiment_id], f"tags.`mixlab.key` = '{key}'")
        return run

    def history(self, run_id: str, name: str) -> list[tuple[int, float, int]]:
        return [(m.step, m.value, m.timestamp) for m in self.client.get_metric_history(run_id, name)]

    def contents(self) -> dict[str, list[tuple]]:
        """All rows that say something about runs."""
        with sqlite3.connect(self.path) as connection:
            tables = ("runs", "metrics", "latest_metrics", "params", "tags")
            return {table: sorted(connection.execute(f"SELECT * FROM {table}"), key=repr) for table in tables}


def until(condition: Callable[[], Any], patience_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s, "it does not come true"
        time.sleep(0.01)


@pytest.fixture
def store(tmp_path, empty_store) -> Iterator[Store]:
    store = Store(tmp_path, empty_store)
    yield store
    for tracker in store.trackers:
        tracker.abandon()


def rows_of(n_rows: int) -> list[dict]:
    return [
        {"step": i, "tokens": 64 * i, "time_ms": 1_700_000_000_000 + i, "wall_s": 0.1 * i, "train/loss": 4 / i}
        for i in range(1, n_rows + 1)
    ]


def log_rows(tracker: RunTracker, rows: list[dict]) -> None:
    for row in rows:
        values = {name: value for name, value in row.items() if name not in schema.NOT_METRICS}
        tracker.log(values, row["step"], row["time_ms"])


FINISHED = RunOutcome(
    "finished",
    step=5,
    tokens=320,
    metrics={"report/accuracy": 0.75, "report/accuracy/T64_P4": None},
    cost={"state_bytes": 1024, "decode_ms_per_token": math.inf},
    impl={"layer 0": "softmax:reference"},
    data_hash="d1",
)


def test_the_schema_arrives(store):
    parent = ensure_parent(
        store.uri,
        store.experiment_id,
        sweep="sweep",
        arm="a",
        cell="n=4",
        factors={"task.n_pairs": 4},
        pattern="softmax",
    )
    rows = rows_of(5)
    rows[4] |= {"select/accuracy": 0.5, "report/accuracy": 0.75, "mixer/0/gate[max]": math.nan}
    tracker = store.started(parent_id=parent)
    run_id = tracker.run_id
    log_rows(tracker, rows)
    assert store.client.get_run(run_id).info.status == "RUNNING"
    folder = store.record(rows, FINISHED)
    tracker.finish(FINISHED, folder)

    run = store.run_of()
    assert run.info.run_id == run_id == tracker.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "model.pattern": "softmax",
        "model.d_model": "8",
        "task.mixture": "[[1, 2], [3, 4]]",
        "train.lr": "0.001",
    }
    tags = {name: value for name, value in run.data.tags.items() if name != schema.MIRRORED}
    assert tags == {
        "mixlab.key": "k1",
        "mixlab.sweep": "sweep",
        "mixlab.arm": 'it\'s "fast"',
        "mixlab.cell": "n=4",
        "mixlab.factors": '{"task.n_pairs": 4}',
        "mixlab.role": "replicate",
        "mixlab.seed": "3",
        "mixlab.pattern": "softmax | pkm@1",
        "mixlab.outcome": "finished",
        "mixlab.impl": '{"layer 0": "softmax:reference"}',
        "mixlab.data_hash": "d1",
        "mixlab.git": "abc",
        "mlflow.parentRunId": parent,
        "mlflow.runName": 'it\'s "fast" | n=4 | replicate seed 3',
    }
    assert store.history(run_id, "train/loss") == [(i, 4 / i, 1_700_000_000_000 + i) for i in range(1, 6)]
    assert run.data.metrics["select/accuracy"] == 0.5
    assert len(store.history(run_id, "report/accuracy")) == 1, "in a row and among the final metrics, but once"
    assert run.data.metrics["report/accuracy"] == 0.75
    assert run.data.metrics["cost/state_bytes"] == 1024
    for name in ("mixer/0/gate_max_", "report/accuracy/T64_P4", "cost/decode_ms_per_token"):
        assert math.isnan(run.data.metrics[name])
    assert not {"step", "tokens", "time_ms", "wall_s"} & set(run.data.metrics)
    artifact = Path(run.info.artifact_uri.removeprefix("file://")) / "config.json"
    assert json.loads(artifact.read_text()) == CONFIG
    assert artifact.is_relative_to(store.path.with_name("artifacts"))
    assert not tracker.behind
    assert tracker.seconds > 0
    assert sync(store.uri, store.experiment_id, store.runs, "sweep") == SyncReport(n_unchanged=1)


@pytest.mark.parametrize(
    ("outcome", "status"),
    [("diverged", "FINISHED"), ("pruned", "FINISHED"), ("failed", "FAILED"), ("killed", "KILLED")],
)
def test_status_follows_the_outcome(store, outcome, status):
    tracker = store.tracker()
    tracker.start()
    ended = RunOutcome(outcome, reason="because")
    tracker.finish(ended, store.record([], ended))
    assert store.run_of().info.status == status
    assert store.run_of().data.tags["mixlab.outcome"] == outcome
    assert store.run_of().data.tags["mixlab.reason"] == "because"


def test_a_run_taken_up_again_is_the_same_run_and_repeats_no_step(store, monkeypatch):
    monkeypatch.setattr(run_tracker_module, "FLUSH_EVERY_S", 0.0)
    first = store.started()
    run_id = first.run_id
    log_rows(first, rows_of(4))
    killed = RunOutcome("killed", step=4)
    first.finish(killed, store.record(rows_of(4), killed))

    second = store.tracker()
    second.start("a run that is gone")
    until(lambda: second.run_id)
    assert second.run_id == run_id
    run = store.run_of()
    assert run.info.status == "RUNNING"
    assert "mixlab.outcome" not in run.data.tags
    again = rows_of(6)
    for row in again[2:]:
        row["time_ms"] += 5_000  # steps 3 and 4 were after the checkpoint
    log_rows(second, again[2:])
    second.finish(FINISHED, store.record(again, FINISHED))
    assert [step for step, _, _ in store.history(run_id, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert store.run_of().info.status == "FINISHED"
    assert sync(store.uri, store.experiment_id, store.runs, "sweep") == SyncReport(n_unchanged=1)


def test_what_an_earlier_try_lost_is_filled_in_at_the_end(store):
    first = store.started()
    log_rows(first, rows_of(4))
    first.abandon()  # the process is killed with a full buffer
    second = store.started()
    run_id = second.run_id
    log_rows(second, rows_of(6)[4:])
    second.finish(FINISHED, store.record(rows_of(6), FINISHED))
    assert [step for step, _, _ in store.history(run_id, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_buffer_is_written_when_full_or_old(store, monkeypatch):
    monkeypatch.setattr(run_tracker_module, "FLUSH_POINTS", 3)
    monkeypatch.setattr(run_tracker_module, "FLUSH_EVERY_S", 1000.0)
    tracker = store.started()
    log_rows(tracker, rows_of(3))
    until(lambda: len(store.history(tracker.run_id, "train/loss")) == 3)
    monkeypatch.setattr(run_tracker_module, "FLUSH_POINTS", 1000)
    monkeypatch.setattr(run_tracker_module, "FLUSH_EVERY_S", 0.05)
    old = store.started("k2")
    log_rows(old, rows_of(2))
    until(lambda: len(store.history(old.run_id, "train/loss")) == 2)
    for each, key in ((tracker, "k1"), (old, "k2")):
        each.finish(FINISHED, store.record(rows_of(3), FINISHED, key))


def test_sync_writes_what_no_tracker_did_and_a_second_time_nothing(store):
    store.record(rows_of(1500), FINISHED, "k1")
    store.record([], RunOutcome("failed", reason="out of memory"), "k2")
    store.record(rows_of(3), None, "k3")  # cut off
    store.started("k4")
    (store.runs / "sweep" / "sweep.json").write_text("{}")
    with run_lock(store.record(rows_of(2), None, "k4")):
        report = sync(store.uri, store.experiment_id, store.runs, "sweep")
        assert report == SyncReport(n_created=3, n_running=1)
    assert store.run_of("k4").info.status == "RUNNING"
    assert sync(store.uri, store.experiment_id, store.runs, "sweep") == SyncReport(n_updated=1, n_unchanged=3)
    before = store.contents()
    assert sync(store.uri, store.experiment_id, store.runs, "sweep") == SyncReport(n_unchanged=4)
    assert store.contents() == before

    run = store.run_of("k1")
    assert len(store.history(run.info.run_id, "train/loss")) == 1500
    assert run.data.metrics["report/accuracy"] == 0.75
    assert run.info.start_time == 1_700_000_000_001
    assert run.info.end_time == 1_700_000_001_501
    assert [store.run_of(f"k{i}").info.status for i in (2, 3, 4)] == ["FAILED", "KILLED", "KILLED"]
    assert len(store.history(store.run_of("k4").info.run_id, "train/loss")) == 2
    parents = {store.run_of(f"k{i}").data.tags["mlflow.parentRunId"] for i in (1, 2, 3)}
    assert len(parents) == 1
    assert store.client.get_run(parents.pop()).data.tags["mixlab.role"] == "parent"


def test_points_that_are_there_already_stay_single(store):
    """Without the mark that all is mirrored, sync looks at every point."""
    rows = rows_of(30)
    rows[4]["report/accuracy"] = 0.75  # a final metric too
    store.record(rows, FINISHED)
    sync(store.uri, store.experiment_id, store.runs, "sweep")
    run_id = store.run_of().info.run_id
    store.client.delete_tag(run_id, schema.MIRRORED)
    before = store.contents()
    assert len(store.history(run_id, "report/accuracy")) == 1
    assert sync(store.uri, store.experiment_id, store.runs, "sweep") == SyncReport(n_updated=1)
    assert store.contents()["metrics"] == before["metrics"]
    log_points(store.client, run_id, schema.row_points(rows))
    assert store.contents()["metrics"] == before["metrics"]


def test_sync_follows_a_record_that_changed(store):
    store.record(rows_of(3), RunOutcome("killed", step=3))
    sync(store.uri, store.experiment_id, store.runs, "sweep")
    store.record(rows_of(5), FINISHED)
    assert sync(store.uri, store.experiment_id, store.runs, "sweep") == SyncReport(n_updated=1)
    run = store.run_of()
    assert run.info.status == "FINISHED"
    assert run.data.tags["mixlab.outcome"] == "finished"
    assert len(store.history(run.info.run_id, "train/loss")) == 5


def test_sync_closes_orphans_only_where_asked_to(store):
    store.started("k1")
    store.record(rows_of(2), None, "k1")
    store.record(rows_of(2), FINISHED, "k2")
    report = sync(store.uri, store.experiment_id, store.runs, "sweep", orphans_only=True)
    assert report == SyncReport(n_updated=1)
    assert store.run_of("k1").info.status == "KILLED"


def test_a_run_that_says_what_the_record_does_not_is_replaced(store):
    """A try that was cut off went further than the one that counts, or elsewhere."""
    store.record(rows_of(4), FINISHED, "k1")
    store.record(rows_of(4), FINISHED, "k2")
    store.record(rows_of(4), FINISHED, "k3")
    for key, other in {"k1": rows_of(6), "k2": [{**rows_of(1)[0], "train/loss": 9.0}], "k3": 2 * rows_of(1)}.items():
        for number, row in enumerate(other):
            row = {**row, "time_ms": row["time_ms"] + number * (key == "k3")}
            log_points(store.client, store.started(key).run_id, schema.row_points([row]))
    before = {key: store.run_of(key).info.run_id for key in ("k1", "k2", "k3")}
    assert sync(store.uri, store.experiment_id, store.runs, "sweep") == SyncReport(n_updated=3)
    for key, run_id in before.items():
        now = store.run_of(key).info.run_id
        assert now != run_id
        assert store.history(now, "train/loss") == [(r["step"], r["train/loss"], r["time_ms"]) for r in rows_of(4)]
    assert sync(store.uri, store.experiment_id, store.runs, "sweep") == SyncReport(n_unchanged=3)


def test_a_key_with_two_runs_keeps_one(store):
    store.record(rows_of(4), FINISHED)
    sync(store.uri, store.experiment_id, store.runs, "sweep")
    store.client.create_run(store.experiment_id, tags={schema.KEY: "k1"})
    assert sync(store.uri, store.experiment_id, store.runs, "sweep") == SyncReport(n_unchanged=1, n_doubled=1)
    assert len(store.history(store.run_of().info.run_id, "train/loss")) == 4


def test_a_locked_store_costs_the_end_of_a_run_little_and_sync_repairs_it(store, monkeypatch):
    monkeypatch.setattr(run_tracker_module, "FLUSH_EVERY_S", 0.01)
    monkeypatch.setattr(run_tracker_module, "FINISH_BUDGET_S", 0.3)
    rows = rows_of(50)
    others = set(threading.enumerate())
    tracker = store.started()
    log_rows(tracker, rows[:10])
    until(lambda: len(store.history(tracker.run_id, "train/loss")) == 10)
    assert not tracker.behind

    lock = sqlite3.connect(store.path, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    before_s = tracker.seconds
    log_rows(tracker, rows[10:])
    assert tracker.seconds - before_s < 0.2, "no step waits for the store"
    folder = store.record(rows, FINISHED)
    tracker.finish(FINISHED, folder)
    assert 0.3 <= tracker.seconds - before_s < 1.0
    assert tracker.behind
    assert problem_of(folder) == tracker.problem != ""
    lock.execute("ROLLBACK")
    lock.close()
    for thread in set(threading.enumerate()) - others:  # the call that was left behind may still get through
        thread.join(25)

    assert sync(store.uri, store.experiment_id, store.runs, "sweep") == SyncReport(n_updated=1)
    assert problem_of(folder) == ""
    expected = [(r["step"], r["train/loss"], r["time_ms"]) for r in rows]
    assert store.history(tracker.run_id, "train/loss") == expected
    assert store.run_of().info.status == "FINISHED"
    assert sync(store.uri, store.experiment_id, store.runs, "sweep") == SyncReport(n_unchanged=1)


@pytest.mark.parametrize("max_buffered", [2, 1000])
def test_a_store_that_comes_back_gets_everything(store, monkeypatch, max_buffered):
    monkeypatch.setattr(run_tracker_module, "FLUSH_EVERY_S", 0.01)
    monkeypatch.setattr(run_tracker_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(run_tracker_module, "MAX_BUFFERED_POINTS", max_buffered)
    hidden = store.path.with_name("hidden.db")
    store.path.rename(hidden)
    tracker = store.tracker()
    tracker.start()
    until(lambda: "there is no store" in tracker.problem)
    log_rows(tracker, rows_of(3))
    assert tracker.behind
    assert not store.path.exists(), "a run never creates a store"
    hidden.rename(store.path)
    log_rows(tracker, rows_of(5)[3:])
    until(lambda: tracker.run_id)
    folder = store.record(rows_of(5), FINISHED)
    tracker.finish(FINISHED, folder)
    assert not tracker.behind
    assert problem_of(folder) == ""
    assert [step for step, _, _ in store.history(tracker.run_id, "train/loss")] == [1, 2, 3, 4, 5]
    assert sync(store.uri, store.experiment_id, store.runs, "sweep") == SyncReport(n_unchanged=1)


def test_nothing_that_a_store_does_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(run_tracker_module, "FINISH_BUDGET_S", 0.2)
    identity = RunIdentity("k", "s", "a", "c", {}, "tuning", 0, "p")
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"no database" * 100)
    for uri in (f"sqlite:///{broken}", "nonsense", "http://127.0.0.1:9", "sqlite://"):
        tracker = RunTracker(uri, "1", identity, {}, parent_id=None, tags={})
        tracker.start()
        tracker.log({"train/loss": 1.0}, 1, 1)
        tracker.finish(RunOutcome("finished"), tmp_path)
        assert tracker.run_id == ""
        assert tracker.behind
        assert tracker.problem
        assert "\n" not in tracker.problem


WORKER = """
import sys
from experiments.records import RunIdentity, RunOutcome, write_identity
from experiments.tracking import RunTracker
from pathlib import Path
uri, experiment_id, folder, name = sys.argv[1:]
for number in range(2):
    identity = RunIdentity(f"{name}{number}", "s", "a", "c", {}, "tuning", number, "p")
    tracker = RunTracker(uri, experiment_id, identity, {"number": number}, parent_id=None, tags={})
    tracker.start()
    for step in range(400):
        tracker.log({"train/loss": step / 7, "train/grad_norm": 1.0, "mixer/0/gate": 0.5}, step, 1000 + step)
    write_identity(Path(folder, identity.key), identity, {"number": number})
    tracker.finish(RunOutcome("finished", step=400), Path(folder, identity.key))
    assert not tracker.behind, tracker.problem
"""


def test_processes_logging_at_once_lose_nothing(store, tmp_path):
    root = Path(__file__).resolve().parents[2]
    arguments = [sys.executable, "-c", WORKER, store.uri, store.experiment_id, str(tmp_path / "folders")]
    workers = [subprocess.Popen([*arguments, name], cwd=root, stderr=subprocess.PIPE) for name in "abc"]
    for worker in workers:
        errors = worker.communicate(timeout=60)[1]
        assert worker.returncode == 0, errors.decode()
        assert errors == b"", "MLflow keeps quiet"
    runs = store.client.search_runs([store.experiment_id])
    assert sorted(run.data.tags["mixlab.key"] for run in runs) == ["a0", "a1", "b0", "b1", "c0", "c1"]
    for run in runs:
        assert run.info.status == "FINISHED"
        for name in ("train/loss", "train/grad_norm", "mixer/0/gate"):
            assert [step for step, _, _ in store.history(run.info.run_id, name)] == list(range(400))


def test_parents_and_experiments_are_made_once(store):
    def parent(arm: str, cell: str = "n='4'") -> str:
        return ensure_parent(store.uri, store.experiment_id, sweep="s", arm=arm, cell=cell, factors={}, pattern="p")

    one = parent('it\'s "odd"')
    assert parent('it\'s "odd"') == one
    assert len({one, parent("other"), parent('it\'s "odd"', "n=8")}) == 3
    assert store.client.get_run(one).info.status == "FINISHED"

    tags = {"question": "which?"}
    assert ensure_experiment(store.uri, "sweep", store.artifacts, tags) == store.experiment_id
    store.client.delete_experiment(store.experiment_id)
    assert ensure_experiment(store.uri, "sweep", store.artifacts, {"question": "why?"}) == store.experiment_id
    experiment = store.client.get_experiment(store.experiment_id)
    assert experiment.lifecycle_stage == "active"
    assert experiment.tags["question"] == "why?"
    assert experiment.artifact_location == f"{store.artifacts}/sweep"


def test_prepare_creates_the_store_whole_and_leaves_a_present_one_alone(tmp_path, empty_store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "new" / "folder" / "mlflow.db"
    prepare_store(f"sqlite:///{path}", path.with_name("artifacts").as_uri())
    assert [p.name for p in path.parent.iterdir()] == ["mlflow.db"]
    before = path.read_bytes()
    prepare_store(f"sqlite:///{path}", path.with_name("artifacts").as_uri())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["new"], "nothing in the current folder"
    with sqlite3.connect(path) as connection:
        ((location,),) = connection.execute("SELECT artifact_location FROM experiments")
    assert location.startswith(path.with_name("artifacts").as_uri())


def test_a_store_made_by_another_process_meanwhile_is_kept(tmp_path):
    draft, path = tmp_path / "draft", tmp_path / "mlflow.db"
    draft.write_text("ours")
    path.write_text("theirs")
    _move_into_place(draft, path)
    assert path.read_text() == "theirs"


def test_stores_that_cannot_be_are_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("no database, but text that is long enough to have a header" * 10)
    (tmp_path / "locked.db").touch()
    lock = sqlite3.connect(tmp_path / "locked.db")
    lock.execute("CREATE TABLE t (x)")
    lock.close()
    cases = {
        f"sqlite:///{tmp_path}": "is a folder; name a file in it",
        f"sqlite:///{tmp_path}/file": "file is not a database",
        f"sqlite:///{tmp_path}/file/below/mlflow.db": "can't be written",
        "sqlite:////proc/nowhere/mlflow.db": "can't be written",
        "sqlite://": "in memory",
        "sqlite:///:memory:": "in memory",
        str(tmp_path / "mlruns"): "give sqlite:///FILE",
        f"file://{tmp_path}/mlruns": "give sqlite:///FILE",
        "htp://host": "did you mean 'http'",
        "http://user:secret@127.0.0.1:9": "can't be reached",
    }
    for uri, words in cases.items():
        with pytest.raises(UserError) as raised:
            prepare_store(uri, tmp_path.as_uri())
        message = str(raised.value)
        assert words in message
        assert "\n" not in message
        assert "secret" not in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "locked.db"]


def test_a_failed_creation_leaves_nothing_behind(tmp_path, monkeypatch):
    from experiments.tracking import store as store_module

    def torn(uri: str, artifact_root: str) -> None:
        Path(uri.removeprefix("sqlite:///")).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "_create_tables", torn)
    with pytest.raises(UserError, match="No space left on device"):
        prepare_store(f"sqlite:///{tmp_path}/a/b/mlflow.db", tmp_path.as_uri())
    assert list(tmp_path.iterdir()) == []


def test_names_and_long_values_are_made_to_fit():
    for odd in ("train/loss", "accuracy/T64_P4", "mixer/layer 0/gate.mean"):
        assert schema.metric_name(odd) == odd
    assert schema.metric_name("gate[0]/ü%") == "gate_0_/__"
    for odd in ("/a", "a//b", "../a", "a/../b", ".", "a/", "x" * 300):
        from mlflow.utils.validation import _validate_metric_name

        _validate_metric_name(schema.metric_name(odd))
    long = schema.params({"a": {"b": "x" * 7000}})["a.b"]
    assert len(long) == 6000
    assert long.endswith("... (cut, 7000 characters; see config.json)")
