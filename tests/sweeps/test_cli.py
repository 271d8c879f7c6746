"""``mixlab sweep plan | run | status``, with real trainings."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from experiments.errors import UserError
from experiments.records import read_sweep_runs
from sweeps.cli import commands
from sweeps.lock import driver_lock
from sweeps.status import sweep_status
from tests.sweeps.helpers import TOP, TUNED, drive, tiny, tuned, write_sweep

BROKEN = """
import os
from mixers.registry import register
from mixers.softmax import SoftmaxAttention

@register("broken_once")
class Broken(SoftmaxAttention):
    def forward(self, *args, **options):
        if "MIXLAB_BROKEN" in os.environ and self.training:
            raise RuntimeError("broken")
        return super().forward(*args, **options)
"""


def mixlab(*words: str):
    result = CliRunner().invoke(commands[0], [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_plan_prints_the_count_and_creates_nothing(tmp_path):
    result = mixlab("plan", write_sweep(tmp_path, TUNED), "budget.tune_trials=3", "seeds=[0,1,2]")
    assert "2 arms x 1 cell x (3 tuning + 3 seeds) = 12 runs" in result.stdout
    assert "train.lr in 0.0001, 0.00316228, 0.1, chosen on select/accuracy" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_plan_names_what_an_adaptive_search_tunes(tmp_path):
    text = TUNED + '"train.schedule" = { choice = ["cosine", "constant"] }\n[search]\nsampler = "tpe"\n'
    shown = mixlab("plan", write_sweep(tmp_path, text), "budget.tune_trials=3").stdout
    assert "train.lr in 0.0001 to 0.1, chosen on" in shown
    assert "train.schedule in cosine, constant, chosen on" in shown


def test_plan_as_json(tmp_path):
    values = json.loads(mixlab("plan", write_sweep(tmp_path, TUNED), "budget.tune_trials=2", "--json").stdout)
    assert values["n_runs"] == 8
    assert values["arm_cells"][0]["trial_settings"] == [{"train.lr": 1e-4}, {"train.lr": 1e-1}]


def test_a_mistake_is_raised_for_the_root_command(tmp_path):
    with pytest.raises(UserError, match="did you mean 'seeds'"):
        mixlab("plan", write_sweep(tmp_path), "seds=[1]")


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'mlflow', 'optuna', 'plotly', 'scipy', 'numpy', 'pydantic', 'rich'}"
    code = f"import sys, sweeps.cli; sys.exit(', '.join({heavy} & set(sys.modules)) or None)"
    result = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_real_sweep_with_tracking_runs_continues_and_has_a_status(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs = tmp_path / "runs"
    words = ("run", write_sweep(tmp_path, TUNED), "budget.tune_trials=1", "seeds=[0]", "--runs", runs, "--workers", "2")
    events = [json.loads(line) for line in mixlab(*words, "--json").stdout.splitlines()]
    assert events[-1]["outcomes"] == {"finished": 4}, [e for e in events if e["event"] == "run_ended"]
    records = read_sweep_runs(runs, "tiny")
    assert len(records) == 4
    for record in records:
        assert record.outcome.step == 2
        assert 0 <= record.outcome.metrics["report/accuracy"] <= 1
        assert record.outcome.mlflow_run_id
    with sqlite3.connect(runs / "mlflow.db") as store:
        rows = store.execute("select key, value from tags where key in ('mixlab.role', 'mixlab.outcome')").fetchall()
        experiment = dict(store.execute("select key, value from experiment_tags").fetchall())
    store.close()
    assert sorted(value for key, value in rows if key == "mixlab.role").count("replicate") == 2
    assert [value for key, value in rows if key == "mixlab.outcome"] == ["finished"] * 4
    assert experiment["mixlab.metric.select"] == "select/accuracy"

    again = mixlab(*words)
    assert again.exit_code == 0
    assert "tiny: done: 4 finished" in again.stdout
    status = mixlab("status", "tiny", "--runs", runs)
    assert "4 of 4 runs have their result; no driver is running it" in status.stdout


def test_status_counts_by_outcome_and_lists_failures(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLAB_FAKE_TARGET", json.dumps({"outcome": {"0.1": "diverged", "1": "raise"}}))
    runs = tmp_path / "runs"
    drive(tuned(tmp_path, 4), runs)
    values = json.loads(mixlab("status", tmp_path / "tiny.toml", "--runs", runs, "--json").stdout)
    assert (values["n_runs"], values["n_missing"], values["driver_runs"]) == (12, 0, False)
    narrow = values["arm_cells"][0]
    assert (narrow["arm"], narrow["n_finished"], narrow["n_diverged"], narrow["n_failed"]) == ("narrow", 4, 1, 1)
    assert narrow["settings"] == {"train.lr": 1e-3}
    assert narrow["mean_report"] == pytest.approx(0.477 + 0.016, abs=0.001)
    assert sorted(failure["outcome"] for failure in values["failures"]) == ["diverged"] * 2 + ["failed"] * 2
    text = mixlab("status", "tiny", "--runs", runs).stdout.replace("\n", "")
    assert "ValueError: this seed is bad" in text


def test_retry_runs_what_failed_once_more(tmp_path, monkeypatch):
    runs, sweep_file = tmp_path / "runs", write_sweep(tmp_path)
    words = (sweep_file, "--runs", runs, "--no-tracking", "--workers", "1", "--json")
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN, encoding="utf-8")
    monkeypatch.setenv("MIXLAB_BROKEN", "1")
    words += ("arms.wide.mixer=broken_once", "seeds=[0]", "--plugin", broken)
    assert mixlab("run", *words).exit_code == 1
    monkeypatch.delenv("MIXLAB_BROKEN")
    assert mixlab("run", *words).exit_code == 1  # it stands as a result
    with pytest.raises(click.UsageError, match="say which runs: --failed"):
        commands[0].main(["retry", str(sweep_file)], standalone_mode=False)
    retried = mixlab("retry", "--failed", *words)
    assert retried.exit_code == 0
    started = [e for line in retried.stdout.splitlines() if (e := json.loads(line))["event"] == "run_started"]
    assert [event["arm"] for event in started] == ["wide"]


def test_status_of_a_sweep_in_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLAB_FAKE_TARGET", "{}")
    runs = tmp_path / "runs"
    drive(tiny(tmp_path), runs)
    first, second, *_ = read_sweep_runs(runs, "tiny")
    (first.folder / "outcome.json").unlink()
    for name in ("outcome.json", "run.json"):
        (second.folder / name).unlink()
    rows = sweep_status(runs, "tiny").arm_cells
    assert (sum(row.n_missing for row in rows), sum(row.n_running for row in rows)) == (2, 0)
    with driver_lock(runs / "tiny"):
        status = sweep_status(runs, "tiny")
    assert status.driver_runs
    assert (sum(row.n_missing for row in status.arm_cells), sum(row.n_running for row in status.arm_cells)) == (1, 1)


def test_status_of_an_unknown_sweep(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLAB_FAKE_TARGET", "{}")
    drive(tiny(tmp_path), tmp_path / "runs")
    with pytest.raises(UserError, match=r"no sweep 'tinny' under .*; did you mean 'tiny'"):
        mixlab("status", "tinny", "--runs", tmp_path / "runs")
