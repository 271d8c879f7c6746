"""Choosing settings, and searches that outlive their driver."""

from __future__ import annotations

import importlib.util
import math

import optuna
import pytest

from experiments.records import RunOutcome
from sweeps.plan import ArmCell, PlannedRun, plan
from sweeps.tuning import Choice, Tuning, choose, open_journal
from tests.sweeps.helpers import tuned

METRIC = "select/accuracy"


def ended(value: float | None, outcome: str = "finished", report: float = 0.0) -> RunOutcome:
    return RunOutcome(outcome, metrics={METRIC: value, "report/accuracy": report})


def results(arm_cell: ArmCell, *outcomes: RunOutcome) -> list[tuple[PlannedRun, RunOutcome]]:
    return [(arm_cell.trial(i, {"train.lr": 0.1 / (i + 1)}), outcome) for i, outcome in enumerate(outcomes)]


@pytest.fixture
def arm_cell(tmp_path) -> ArmCell:
    return plan(tuned(tmp_path)).arm_cells[0]


@pytest.mark.parametrize(("direction", "trial"), [("maximize", 2), ("minimize", 1)])
def test_the_best_select_value_wins_whatever_report_says(arm_cell, direction, trial):
    found = results(arm_cell, ended(0.5, report=9.0), ended(0.1, report=5.0), ended(0.9, report=-9.0))
    choice = choose(found, METRIC, direction)
    assert (choice.trial, choice.settings, choice.key) == (trial, found[trial][0].settings, found[trial][0].key)


def test_the_first_of_equals_wins(arm_cell):
    assert choose(results(arm_cell, ended(0.1), ended(0.5), ended(0.5)), METRIC, "maximize").trial == 1


def test_only_finished_trials_with_a_finite_value_can_win(arm_cell):
    outcomes = [ended(9.0, "diverged"), ended(8.0, "failed"), ended(7.0, "pruned"), ended(math.nan), ended(None)]
    assert choose(results(arm_cell, *outcomes, ended(0.1)), METRIC, "maximize").trial == 5
    nothing = choose(results(arm_cell, *outcomes), METRIC, "maximize")
    assert nothing.settings is None
    assert nothing.reason == (
        "not run: none of 5 tuning trials can be chosen "
        "(1 diverged, 1 failed, 1 pruned, 2 without a finite select/accuracy)"
    )


class Search:
    """A search with its records, which can be closed at any moment and opened again."""

    def __init__(self, tmp_path, **overrides):
        self.arm_cell = plan(tuned(tmp_path, **overrides)).arm_cells[0]
        self.journal = tmp_path / "optuna.journal"
        self.records: dict[str, RunOutcome] = {}
        self.completed: list[str] = []

    def open(self) -> Tuning:
        return Tuning.open(self.arm_cell, open_journal(self.journal), self.records.get)

    def complete(self, run: PlannedRun) -> RunOutcome:
        """What a worker does: the record is there before anybody tells the study."""
        outcome = ended(-abs(math.log10(run.settings["train.lr"]) + 2))
        self.records[run.key] = outcome
        self.completed.append(run.key)
        return outcome

    def finish(self, tuning: Tuning) -> Choice:
        while (run := tuning.next_run()) is not None:
            tuning.tell(run, self.complete(run))
        return tuning.choice


SAMPLERS = pytest.mark.parametrize("sampler", ["spread", "random", "qmc", "grid", "tpe", "gp", "nsgaii"])
TWO_SETTINGS = {"train.lr": {"log_uniform": [1e-4, 1e-1]}, "train.beta1": {"uniform": [0.5, 0.9]}}
needs_cmaes = pytest.mark.skipif(importlib.util.find_spec("cmaes") is None, reason="the package cmaes is not installed")


@SAMPLERS
def test_a_search_runs_every_trial_once_and_a_finished_one_no_more(tmp_path, sampler):
    search = Search(tmp_path, n_trials=6, search__sampler=sampler)
    choice = search.finish(search.open())
    assert len(search.completed) == len(set(search.completed)) == 6
    again = search.open()
    assert again.next_run() is None
    assert again.complete
    assert again.choice == choice
    assert len(search.completed) == 6


@SAMPLERS
def test_a_search_goes_on_after_its_driver_was_lost(tmp_path, sampler):
    search = Search(tmp_path, n_trials=6, search__sampler=sampler)
    first = search.open()
    told, untold, lost = first.next_run(), first.next_run(), first.next_run()
    first.tell(told, search.complete(told))
    search.complete(untold)  # its record is there, but the driver went away before it told the study

    second = search.open()
    assert set(second.results) == {told.key, untold.key}
    resumed = [second.next_run().key for _ in range(4)]
    assert lost.key in resumed
    del second  # lost again, with all of them running

    third = search.open()
    search.finish(third)
    assert len(search.completed) == len(set(search.completed)) == 6
    assert lost.key in search.completed
    states = [trial.state.name for trial in third.study.get_trials()]
    assert states.count("COMPLETE") == 6
    assert "RUNNING" not in states
    assert "WAITING" not in states


def test_adaptive_proposals_do_not_start_over_with_a_new_driver(tmp_path):
    search = Search(tmp_path, n_trials=4, search__sampler="tpe")
    for _ in range(4):
        tuning = search.open()
        run = tuning.next_run()
        tuning.tell(run, search.complete(run))
    assert len(set(search.completed)) == 4


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsgaii", pytest.param("cmaes", marks=needs_cmaes)])
def test_a_search_that_loses_its_driver_proposes_what_an_undisturbed_one_does(tmp_path, sampler):
    options = {"nsgaii": {"population_size": 3}}.get(sampler, {"n_startup_trials": 2})
    fixed = {"n_trials": 8, "tune": TWO_SETTINGS, "search__sampler": sampler, "search__options": options}
    (tmp_path / "whole").mkdir()
    whole, broken = Search(tmp_path / "whole", **fixed), Search(tmp_path, **fixed)
    whole.finish(whole.open())
    for kept in (True, False) * 8:
        tuning = broken.open()
        if (run := tuning.next_run()) is None:
            break
        if kept:
            tuning.tell(run, broken.complete(run))
    assert broken.completed == whole.completed
    assert len(set(whole.completed)) == 8


def test_an_adaptive_search_learns(tmp_path):
    """After its random trials it comes nearer to the optimum than a blind one of the same budget."""
    fixed = {"n_trials": 12, "search__sampler": "gp", "search__options": {"n_startup_trials": 4}}
    search = Search(tmp_path, **fixed)
    search.finish(search.open())
    values = [search.records[key].metrics[METRIC] for key in search.completed]
    assert max(values[4:]) > max(values[:4])
    assert max(values) > -0.01


def test_settings_proposed_twice_are_run_once(tmp_path):
    text = "[search]\nsampler = 'tpe'\n"
    search = Search(tmp_path, n_trials=8, text=text, tune__train__lr={"choice": [1e-3, 1e-2]})
    choice = search.finish(search.open())
    assert len(search.completed) == len(set(search.completed)) <= 2
    assert choice.settings == {"train.lr": 1e-2}
    again = search.open()
    assert again.next_run() is None
    assert again.complete


def test_a_lost_journal_is_made_again_from_the_records(tmp_path):
    search = Search(tmp_path, n_trials=4)
    choice = search.finish(search.open())
    search.journal.unlink()
    tuning = search.open()
    assert tuning.complete
    assert tuning.choice == choice
    values = [trial.value for trial in tuning.study.get_trials()]
    assert sorted(values) == sorted(outcome.metrics[METRIC] for outcome in search.records.values())


def test_a_torn_last_line_of_the_journal_is_cut_off(tmp_path):
    search = Search(tmp_path, n_trials=3)
    tuning = search.open()
    run = tuning.next_run()
    tuning.tell(run, search.complete(run))
    with open(search.journal, "ab") as file:
        file.write(b'{"op_code": 6, "worker')
    search.finish(search.open())
    assert len(search.completed) == len(set(search.completed)) == 3


def test_a_deleted_record_is_run_again(tmp_path):
    search = Search(tmp_path, n_trials=3)
    search.finish(search.open())
    key = search.completed[1]
    del search.records[key]
    tuning = search.open()
    assert not tuning.complete
    search.finish(tuning)
    assert search.completed.count(key) == 2
    assert len(search.completed) == 4


@pytest.mark.parametrize(
    ("outcome", "state"),
    [(ended(0.3), "COMPLETE"), (ended(9.0, "diverged"), "PRUNED"), (ended(None, "failed"), "FAIL")],
)
def test_what_the_study_is_told(tmp_path, outcome, state):
    tuning = Search(tmp_path, n_trials=1).open()
    tuning.tell(tuning.next_run(), outcome)
    (trial,) = tuning.study.get_trials()
    assert trial.state.name == state
    assert trial.params == {"train.lr": pytest.approx(10**-2.5, rel=1e-5)}


def test_an_edited_search_space_is_a_new_study(tmp_path):
    first = Search(tmp_path, n_trials=2)
    first.finish(first.open())
    second = Search(tmp_path, n_trials=3)
    assert len(second.open().runs) == 3
    assert len(optuna.get_all_study_names(open_journal(first.journal))) == 2
