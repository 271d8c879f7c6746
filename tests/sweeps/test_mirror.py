"""Sweeps and their MLflow mirror: with the store out of reach, with runs left RUNNING, with a sync beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

from experiments.paths import tracking_uri
from experiments.records import read_sweep_runs, write_identity
from experiments.run import run_experiment
from experiments.tracking import RunTracker, SyncReport, schema, sync
from experiments.tracking.client import all_runs, client_of
from sweeps.executor import TARGET
from sweeps.mirror import SweepMirror
from sweeps.plan import plan
from tests.experiments.test_tracking import until
from tests.sweeps.helpers import TOP, drive, tiny


def mlflow_runs(runs: Path) -> list:
    client = client_of(tracking_uri(runs))
    experiment = client.get_experiment_by_name("tiny")
    return list(all_runs(client, experiment.experiment_id))


def mixlab(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    return subprocess.Popen(
        [sys.executable, "-m", "mixlab", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_sweep_whose_store_is_out_of_reach_runs_and_the_next_start_catches_up(tmp_path, monkeypatch):
    runs, sweep = tmp_path / "runs", tiny(tmp_path, seeds=[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result, events = drive(sweep, runs, tracked=True, target=TARGET)
    assert result.outcomes == {"finished": 2}
    notes = [event["message"] for event in events if event["event"] == "note"]
    assert len(notes) == 2, "once before the runs, once after them"
    for note in notes:
        assert "server can't be reached" in note
        assert note.endswith("the records on disk are complete, `mixlab sync tiny` catches up")
    assert len(list(runs.glob("tiny/*/unsynced.json"))) == 2

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    result, events = drive(sweep, runs, tracked=True, target=TARGET)
    assert result.outcomes == {"finished": 2}
    assert not [event for event in events if event["event"] in ("note", "run_started")]
    assert not list(runs.glob("tiny/*/unsynced.json"))
    found = mlflow_runs(runs)
    parents = {run.info.run_id: run for run in found if run.data.tags[schema.ROLE] == schema.PARENT_ROLE}
    children = [run for run in found if run.info.run_id not in parents]
    assert sorted(run.data.tags[schema.ARM] for run in parents.values()) == ["narrow", "wide"]
    assert {run.data.tags[schema.KEY] for run in children} == {r.identity.key for r in read_sweep_runs(runs, "tiny")}
    for run in children:
        assert run.info.status == "FINISHED"
        assert parents[run.data.tags[schema.PARENT_RUN]].data.tags[schema.ARM] == run.data.tags[schema.ARM]
    experiment = client_of(tracking_uri(runs)).get_experiment_by_name("tiny")
    assert experiment.tags["mixlab.question"] == sweep.question


def test_the_next_start_closes_the_runs_of_a_driver_that_was_killed(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs, planned = tmp_path / "runs", plan(tiny(tmp_path))
    mirror = SweepMirror.prepare(planned, runs)
    run = planned.arm_cells[0].replicates({})[0]
    target = mirror.target(run)
    write_identity(runs / "tiny" / run.key, run.identity, run.config.resolved())
    tracker = RunTracker(
        target["uri"], target["experiment_id"], run.identity, run.config.resolved(), parent_id=None, tags={}
    )
    tracker.start()
    until(lambda: tracker.run_id)
    tracker.abandon()
    client = client_of(mirror.uri)
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    SweepMirror.prepare(planned, runs)
    closed = client.get_run(tracker.run_id)
    assert (closed.info.status, closed.data.tags[schema.OUTCOME]) == ("KILLED", "killed")


def test_sync_beside_a_running_training_leaves_it_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs, planned = tmp_path / "runs", plan(tiny(tmp_path))
    mirror = SweepMirror.prepare(planned, runs)
    run = planned.arm_cells[0].replicates({})[0]
    running, synced = threading.Event(), threading.Event()

    def on_progress(progress) -> None:
        running.set()
        assert synced.wait(60)

    from experiments.run import TrackingTarget

    tracking = TrackingTarget(**mirror.target(run))
    training = threading.Thread(
        target=run_experiment,
        args=(run.config, run.identity, runs),
        kwargs={"tracking": tracking, "on_progress": on_progress},
    )
    training.start()
    assert running.wait(60)
    beside = mixlab("sync", "tiny", "--json", "--runs", str(runs))
    output, errors = beside.communicate(timeout=60)
    synced.set()
    training.join()
    assert json.loads(output)["tiny"] == vars(SyncReport(n_running=1)), errors
    assert sync(mirror.uri, mirror.experiment_id, runs, "tiny") == SyncReport(n_unchanged=1)
    assert Counter(r.data.tags[schema.ROLE] for r in mlflow_runs(runs)) == {"parent": 2, "replicate": 1}


def test_sync_takes_a_name_a_folder_or_nothing_and_says_what_it_did(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from sweeps.sync_cli import sync as command

    runs = tmp_path / "runs"
    drive(tiny(tmp_path, seeds=[0]), runs)
    store = f"sqlite:///{tmp_path}/elsewhere.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # restored afterwards: --store sets it
    done = "tiny: 0 created, 0 updated, 2 already up to date\n"
    for words, expected in (
        (["tiny"], "tiny: 2 created, 0 updated, 0 already up to date\n"),
        ([], done),
        ([str(runs)], done),
        ([str(runs / "tiny")], done),
    ):
        result = CliRunner().invoke(command, [*words, "--runs", str(runs), "--store", store], catch_exceptions=False)
        assert result.output == expected
    result = CliRunner().invoke(command, ["tinny", "--runs", str(runs), "--store", store])
    assert str(result.exception) == f"no records of 'tinny' under {runs}; did you mean 'tiny'?"
