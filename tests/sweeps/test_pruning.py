"""Tuning trials that end early because they can't win."""

from __future__ import annotations

import json

import pytest

from experiments.errors import UserError
from experiments.progress import Pruned
from experiments.records import read_metrics, read_outcome, run_folder
from experiments.run import run_experiment
from sweeps.plan import plan
from sweeps.status import sweep_status
from tests.sweeps.helpers import completions, drive, tuned

PRUNED = {
    "search__pruner": "median",
    "search__pruner_options": {"n_startup_trials": 2},
    "base__train__eval_every": 1,
    "seeds": [0],
}
RATES = {"log_uniform": [3e-3, 1e-1]}


def behaviour(n_trials: int) -> str:
    """Evenly spaced rates of which the first is the best: the third and later ones can't win.

    They wait for the driver's word, however long it takes.
    """
    rates = [3e-3 * (1e-1 / 3e-3) ** (i / (n_trials - 1)) for i in range(2, n_trials)]
    return json.dumps({"n_steps": 10, "step_s": 0.01, "outcome": {f"{rate:g}": "lingers" for rate in rates}})


def test_trials_worse_than_the_median_end_early_and_never_win(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLAB_FAKE_TARGET", behaviour(6))
    sweep = tuned(tmp_path, 6, tune__train__lr=RATES, **PRUNED)
    result, events = drive(sweep, tmp_path)
    assert result.outcomes == {"finished": 2 * 2 + 2, "pruned": 2 * 4}
    ended = [event for event in events if event["event"] == "run_ended"]
    pruned = [event for event in ended if event["outcome"] == "pruned"]
    assert all(event["reason"].startswith("median pruner: select/accuracy = ") for event in pruned)
    assert all(read_outcome(run_folder(tmp_path, "tiny", event["key"])).step < 10 for event in pruned)
    chosen = [event for event in events if event["event"] == "chosen"]
    assert [event["settings"] for event in chosen] == [{"train.lr": 3e-3}] * 2
    status = sweep_status(tmp_path, "tiny")
    assert [(row.n_finished, row.n_pruned, row.n_missing) for row in status.arm_cells] == [(3, 4, 0)] * 2

    again, events = drive(sweep, tmp_path)
    assert again.outcomes == result.outcomes
    assert not [event for event in events if event["event"] == "run_started"]


def test_without_the_pruner_pruned_trials_are_run_to_their_end(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLAB_FAKE_TARGET", behaviour(4))
    options = {**PRUNED, "tune__train__lr": RATES}
    assert drive(tuned(tmp_path, 4, **options), tmp_path)[0].outcomes == {"finished": 2 * (2 + 1), "pruned": 2 * 2}
    monkeypatch.setenv("MIXLAB_FAKE_TARGET", "{}")
    options |= {"search__pruner": "none", "search__pruner_options": {}}
    result, _ = drive(tuned(tmp_path, 4, **options), tmp_path)
    assert result.outcomes == {"finished": 2 * (4 + 1)}
    assert set(completions(tmp_path).values()) == {1}


def test_hyperband_lets_the_best_trial_finish(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLAB_FAKE_TARGET", json.dumps({"n_steps": 10, "step_s": 0.05}))
    options = {**PRUNED, "search__pruner": "hyperband", "search__pruner_options": {"reduction_factor": 2}}
    sweep = tuned(tmp_path, 6, tune__train__lr=RATES, budget__max_steps=10, **options)
    result, events = drive(sweep, tmp_path)
    assert result.outcomes["pruned"] > 0
    assert result.outcomes["pruned"] + result.outcomes["finished"] == 2 * (6 + 1)
    assert all(event["settings"] == {"train.lr": 3e-3} for event in events if event["event"] == "chosen")


def test_a_training_that_is_pruned_records_where_it_stood(tmp_path):
    planned = plan(tuned(tmp_path, 2, budget__max_steps=6, base__train__eval_every=2, base__train__device="cpu"))
    run = planned.arm_cells[0].trial(0, {"train.lr": 1e-3})
    evaluated = []

    def on_progress(progress):
        evaluated.extend([progress.step] if progress.evaluated else [])
        if len(evaluated) == 2:
            raise Pruned("no chance")

    outcome = run_experiment(run.config, run.identity, tmp_path, on_progress=on_progress)
    folder = run_folder(tmp_path, "tiny", run.key)
    assert evaluated == [2, 4]
    assert (outcome.outcome, outcome.reason, outcome.step) == ("pruned", "no chance", 4)
    last = [row for row in read_metrics(folder) if "select/accuracy" in row][-1]
    assert outcome.metrics["select/accuracy"] == last["select/accuracy"]
    assert read_outcome(folder) == outcome
    assert not (folder / "checkpoint.pt").exists()


def test_a_pruner_needs_evaluations(tmp_path):
    with pytest.raises(UserError, match=r"search\.pruner = 'median' needs train\.eval_every > 0"):
        plan(tuned(tmp_path, **{**PRUNED, "base__train__eval_every": 0}))
