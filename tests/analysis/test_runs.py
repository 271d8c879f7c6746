from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from analysis.runs import RunRow, rows_from_mlflow_runs, rows_from_records
from experiments.errors import UserError
from experiments.records import RunOutcome, write_identity, write_outcome
from sweeps.saved import SavedRun
from tests.analysis import planted
from tests.analysis.conftest import Store


def test_only_runs_of_the_current_plan_count(tmp_path: Path) -> None:
    saved = planted.plan(pairs=(8,))
    planted.write_records(tmp_path, saved)
    _, identity, settings, result = planted.runs_of(saved)[0]
    stale = dataclasses.replace(identity, key="of-an-older-file")
    write_identity(tmp_path / saved.name / stale.key, stale, settings)
    write_outcome(tmp_path / saved.name / stale.key, result)
    found, rows = rows_from_records(tmp_path, saved.name)
    assert found == saved
    assert [row.key for row in rows] == [run.key for run in saved.runs]


def test_a_run_without_outcome_is_unfinished_and_what_is_not_finite_is_none(tmp_path: Path) -> None:
    saved = planted.plan(arms={"attention": "softmax"}, pairs=(8,))
    planted.write_records(tmp_path, saved)
    first, second, third = (tmp_path / saved.name / run.key for run in saved.runs)
    (first / "outcome.json").unlink()
    write_outcome(second, RunOutcome("finished", metrics={"report/accuracy": math.nan}, cost={"params": math.inf}))
    (third / "run.json").write_text("{torn")
    _, rows = rows_from_records(tmp_path, saved.name)
    assert [row.outcome for row in rows] == ["unfinished", "finished"]
    assert rows[0].metrics == rows[0].cost == {}
    assert rows[1].metrics == {"report/accuracy": None}
    assert rows[1].cost == {"params": None}


def test_an_unknown_sweep_lists_near_matches(tmp_path: Path) -> None:
    planted.write_records(tmp_path, planted.plan(pairs=(8,)))
    with pytest.raises(UserError, match=r"no sweep 'mqar_stat' .*did you mean 'mqar_state'"):
        rows_from_records(tmp_path, "mqar_stat")


def test_mlflow_gives_the_same_rows_as_the_records(store: Store) -> None:
    from mlflow.tracking import MlflowClient

    saved, from_records = rows_from_records(store.runs, "mqar_state")
    client = MlflowClient(tracking_uri=store.uri)
    with_plan, rows = rows_from_mlflow_runs(client, "mqar_state", saved)
    assert with_plan == saved
    assert [_without_link(row) for row in rows] == [_without_link(row) for row in from_records]
    assert all(row.link for row in rows)
    derived, rows = rows_from_mlflow_runs(client, store.experiment_id)
    assert {_name(row): _without_link(row) for row in rows} == {_name(row): _without_link(row) for row in from_records}
    for part in ("name", "question", "metric", "arms", "cells", "seeds"):
        assert getattr(derived, part) == getattr(saved, part), part
    assert list(derived.arms) == list(saved.arms)
    assert list(derived.cells) == list(saved.cells)


def _name(row: RunRow) -> tuple[str, str, int]:
    return row.arm, row.cell, row.seed


def _without_link(row: RunRow) -> RunRow:
    """MLflow keeps no reason in the schema, and the records of this sweep no MLflow id."""
    return dataclasses.replace(row, link="", reason="")


def test_in_mlflow_a_newer_run_replaces_the_one_of_an_older_sweep_file(store: Store) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store.uri)
    saved = planted.plan("changed", arms={"attention": "softmax"}, pairs=(8,))
    experiment = planted.write_mlflow(store.uri, saved, (store.runs / "artifacts").as_uri())
    planned, identity, settings, _ = planted.runs_of(saved)[1]
    later = dataclasses.replace(identity, key="newer")
    newest = RunOutcome("finished", metrics={"report/accuracy": 0.25, "report/loss": math.nan}, cost={"x": math.inf})
    settings = {**settings, "train": {"lr": 0.5}}
    planted.log_run(client, experiment, later, settings, newest, 1_900_000_000_000)
    # an older tuning trial of the same seed stays, as tuning trials differ by key
    for key in ("t1", "t2"):
        tuning = dataclasses.replace(identity, key=key, role="tuning", seed=9)
        planted.log_run(client, experiment, tuning, settings, newest, 1_900_000_000_000)

    _, rows = rows_from_mlflow_runs(client, "changed")
    replicates = [row for row in rows if row.role == "replicate"]
    assert sorted(row.seed for row in replicates) == [0, 1, 2]
    changed = next(row for row in replicates if row.seed == planned.seed)
    assert changed.key == "newer"
    assert changed.metrics == {"report/accuracy": 0.25, "report/loss": None}
    assert changed.cost == {"x": None}
    assert changed.settings["train.lr"] == 0.5
    assert sorted(row.key for row in rows if row.role == "tuning") == ["t1", "t2"]

    # with the older plan at hand, its own keys count
    _, rows = rows_from_mlflow_runs(client, "changed", saved)
    assert [row.key for row in rows] == [run.key for run in saved.runs]
    newer_plan = dataclasses.replace(saved, runs=[SavedRun("newer", "attention", "n_pairs=8", "replicate", 1)])
    _, rows = rows_from_mlflow_runs(client, "changed", newer_plan)
    assert [row.key for row in rows] == ["newer"]


def test_mlflow_settings_come_back_as_values(store: Store) -> None:
    from mlflow.tracking import MlflowClient

    _, rows = rows_from_mlflow_runs(MlflowClient(tracking_uri=store.uri), "mqar_state")
    settings = rows[0].settings
    assert settings["task.vocab_size"] == 8192
    assert isinstance(settings["task.vocab_size"], int)
    assert settings["train.stop"] is None
    assert settings["train.compile"] is False
    assert isinstance(settings["train.lr"], float)
    assert settings["task.name"] == "mqar"


def test_an_experiment_without_a_sweep_is_refused(store: Store) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store.uri)
    for name in ("Default", "0", "mqar_stat"):
        with pytest.raises(UserError, match="no sweep"):
            rows_from_mlflow_runs(client, name)
