"""Whole trainings, mirrored to real stores that fail: the record is complete whatever happens, and ``sync`` mends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.config import ExperimentConfig
from experiments.pattern import parse_pattern
from experiments.progress import Progress
from experiments.records import RunIdentity, RunOutcome, RunRecord, read_metrics, read_sweep_runs
from experiments.run import TrackingTarget, run_experiment
from experiments.tracking import SyncReport, ensure_experiment, prepare_store, schema, sync
from experiments.tracking import run_tracker as run_tracker_module
from experiments.tracking.client import all_runs, client_of
from experiments.tracking.mirror import without_time
from experiments.tracking.unsynced import problem_of
from tests.stores import MlflowServer, mlflow_server, postgres, small_disk

TOP = Path(__file__).resolve().parents[2]
CONFIG = {
    "model": {"pattern": "softmax(head_dim=8)", "d_model": 16, "n_layers": 1},
    "task": {"name": "mqar", "vocab_size": 64, "seq_len": 32, "n_pairs": 4}
    | {"n_train": 256, "n_select": 16, "n_report": 16},
    "train": {"batch_size": 8, "max_steps": 40, "log_every": 1, "eval_every": 10, "device": "cpu"},
}


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_uri() -> Iterator[str]:
    with postgres() as uri:
        yield uri


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunRecord:
    """A training without a tracker."""
    runs = tmp_path_factory.mktemp("undisturbed")
    train(runs)
    return only_record(runs)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(run_tracker_module, "FLUSH_EVERY_S", 0.02)
    monkeypatch.setattr(run_tracker_module, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(run_tracker_module, "AILING_BUDGET_S", 0.3)


def opened(uri: str, name: str, folder: Path) -> TrackingTarget:
    prepare_store(uri, (folder / "artifacts").as_uri())
    return TrackingTarget(uri, ensure_experiment(uri, name, (folder / "artifacts").as_uri(), {}))


def train(
    runs: Path,
    target: TrackingTarget | None = None,
    name: str = "s",
    at_step: dict[int, Callable[[], Any]] | None = None,
) -> RunOutcome:
    """Train; ``at_step`` says what happens meanwhile. A tracked step takes long enough for the tracker's thread."""
    config = ExperimentConfig.parse(CONFIG, "test")
    pattern = str(parse_pattern(config.model.pattern))
    who = RunIdentity(config.key(), name, pattern, "all", {}, "replicate", config.seed, pattern)
    waiting = dict(at_step or {})

    def on_progress(progress: Progress) -> None:
        if target is not None:
            time.sleep(0.01)
        if progress.step in waiting:
            waiting.pop(progress.step)()

    outcome = run_experiment(config, who, runs, tracking=target, on_progress=on_progress)
    assert outcome.outcome == "finished"
    assert not waiting
    return outcome


def only_record(runs: Path, name: str = "s") -> RunRecord:
    (record,) = read_sweep_runs(runs, name)
    return record


def results(record: RunRecord) -> tuple[Any, ...]:
    """What is the same however often a training is run."""
    rows = [{k: v for k, v in row.items() if k not in ("time_ms", "wall_s")} for row in read_metrics(record.folder)]
    for row in rows:
        for name in [name for name in row if name.endswith("_per_s")]:
            del row[name]
    return rows, record.config, record.outcome.metrics, record.outcome.data_hash, record.outcome.step


def assert_mirrors(target: TrackingTarget, record: RunRecord) -> None:
    """MLflow holds the record, no more and no less."""
    client = client_of(target.uri)
    (run,) = all_runs(client, target.experiment_id)
    outcome = record.outcome
    points = [*schema.row_points(read_metrics(record.folder)), *schema.final_points(outcome, 0)]
    there = [
        (name, m.step, str(m.value))
        for name in run.data.metrics
        for m in client.get_metric_history(run.info.run_id, name)
    ]
    assert Counter(there) == Counter({without_time(point) for point in points})
    assert run.data.params == schema.params(record.config)
    expected = {**schema.identity_tags(record.identity), **schema.outcome_tags(outcome)}
    own = (schema.GIT, schema.MIRRORED, "mlflow.")
    assert {n: v for n, v in run.data.tags.items() if not n.startswith(own)} == {
        n: v for n, v in expected.items() if not n.startswith(own)
    }
    assert run.info.status == schema.status(outcome)
    path = client.download_artifacts(run.info.run_id, "config.json")
    assert json.loads(Path(path).read_text()) == record.config


def sync_report(target: TrackingTarget, runs: Path, name: str = "s") -> SyncReport:
    return sync(target.uri, target.experiment_id, runs, name)


def assert_mends(target: TrackingTarget, runs: Path, undisturbed: RunRecord, name: str = "s") -> None:
    """The record is what it would have been; one sync mirrors it, a second changes nothing."""
    record = only_record(runs, name)
    assert results(record) == results(undisturbed)
    sync_report(target, runs, name)
    assert problem_of(record.folder) == ""
    assert_mirrors(target, record)
    assert sync_report(target, runs, name) == SyncReport(n_unchanged=1)
    assert_mirrors(target, record)


@pytest.mark.parametrize("kind", ["sqlite", "server", "postgres"])
def test_every_kind_of_store_holds_the_record(tmp_path, request, undisturbed, kind):
    if kind == "sqlite":
        uri = f"sqlite:///{tmp_path}/mlflow.db"
    else:
        uri = request.getfixturevalue("postgres_uri") if kind == "postgres" else request.getfixturevalue("server").uri
    mirrored = opened(uri, "mirrored", tmp_path)
    train(tmp_path / "runs", mirrored, "mirrored")
    record = only_record(tmp_path / "runs", "mirrored")
    assert results(record) == results(undisturbed)
    assert problem_of(record.folder) == ""
    assert_mirrors(mirrored, record)
    assert sync_report(mirrored, tmp_path / "runs", "mirrored") == SyncReport(n_unchanged=1)

    # Written by sync alone it is the same.
    synced = opened(uri, "synced", tmp_path)
    assert sync_report(synced, tmp_path / "runs", "mirrored") == SyncReport(n_created=1)
    assert_mirrors(synced, record)


def test_a_server_killed_in_the_middle_and_started_again_while_the_training_goes_on(tmp_path, server, undisturbed):
    target = opened(server.uri, "back_in_time", tmp_path)
    faults = {10: server.kill, 30: server.start}
    train(tmp_path, target, "back_in_time", faults)
    assert_mends(target, tmp_path, undisturbed, "back_in_time")


def test_a_server_killed_in_the_middle_and_back_after_the_end(tmp_path, server, undisturbed, capfd):
    target = opened(server.uri, "back_too_late", tmp_path)
    train(tmp_path, target, "back_too_late", {10: server.kill})
    assert problem_of(only_record(tmp_path, "back_too_late").folder)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "tracking is behind" in line]
    assert line.endswith("; the records on disk are complete, `mixlab sync back_too_late` catches up")
    server.start()
    assert_mends(target, tmp_path, undisturbed, "back_too_late")


def test_a_server_that_takes_requests_and_never_answers(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(run_tracker_module, "FINISH_BUDGET_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        outcome = train(tmp_path, TrackingTarget(f"http://127.0.0.1:{silent.getsockname()[1]}", "1"))
    assert outcome.cost["tracking_s"] < outcome.wall_s
    assert problem_of(only_record(tmp_path).folder) == "no answer within 0.5 s"
    assert_mends(opened(f"sqlite:///{tmp_path}/mlflow.db", "s", tmp_path), tmp_path, undisturbed)


LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_store_locked_by_another_process(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(run_tracker_module, "FINISH_BUDGET_S", 0.5)
    target = opened(f"sqlite:///{tmp_path}/mlflow.db", "s", tmp_path)
    lockers: list[subprocess.Popen[str]] = []

    def lock() -> None:
        command = [sys.executable, "-c", LOCKER, str(tmp_path / "mlflow.db")]
        lockers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert lockers[0].stdout.readline() == "locked\n"

    train(tmp_path, target, at_step={10: lock})
    assert problem_of(only_record(tmp_path).folder)
    lockers[0].communicate()
    assert_mends(target, tmp_path, undisturbed)


def test_a_full_disk_under_the_store(tmp_path, undisturbed):
    with small_disk(tmp_path / "disk", "4m") as disk:
        target = opened(f"sqlite:///{disk}/mlflow.db", "s", disk)
        filler = disk / "filler"

        def fill() -> None:
            descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT)
            with contextlib.suppress(OSError):
                while os.write(descriptor, bytes(512)):
                    pass
            os.close(descriptor)
            assert os.statvfs(disk).f_bavail == 0

        train(tmp_path, target, at_step={10: fill})
        assert "full" in problem_of(only_record(tmp_path).folder)
        filler.unlink()
        assert_mends(target, tmp_path, undisturbed)


def test_a_sync_that_is_killed_is_completed_by_the_next(tmp_path, undisturbed):
    runs = tmp_path / "runs"
    for number in range(12):
        copy = runs / "s" / f"k{number}"
        copy.mkdir(parents=True)
        for path in undisturbed.folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        (copy / "run.json").write_text(json.dumps({**vars(undisturbed.identity), "key": f"k{number}"}))
    target = opened(f"sqlite:///{runs}/mlflow.db", "s", runs)
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "mixlab", "sync", "s", "--json", "--runs", str(runs)]
    killed = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    client = client_of(target.uri)
    while len(list(all_runs(client, target.experiment_id))) < 3:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)["s"]
    assert report["n_created"] + report["n_updated"] + report["n_unchanged"] == 12
    assert report["n_created"] < 12
    for run in all_runs(client, target.experiment_id):
        assert run.info.status == "FINISHED"
        history = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
        assert history == sorted(set(history))
    keys = Counter(run.data.tags[schema.KEY] for run in all_runs(client, target.experiment_id))
    assert keys == Counter(f"k{number}" for number in range(12))
    assert sync_report(target, runs) == SyncReport(n_unchanged=12)
