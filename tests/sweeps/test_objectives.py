"""Searches for a Pareto front, and within constraints."""

from __future__ import annotations

import random

import pytest

from experiments.errors import UserError
from experiments.records import RunOutcome
from sweeps.executor import TARGET
from sweeps.objectives import Constraint, undominated
from sweeps.plan import plan
from sweeps.status import sweep_status
from sweeps.tuning import Tuning, open_journal
from tests.sweeps.helpers import drive, tuned

SEARCH = {
    "search__objectives": ["select/accuracy", "cost/state_bytes"],
    "tune": {"model.short_conv": {"int_uniform": [2, 40]}, "train.lr": {"log_uniform": [1e-4, 1e-1]}},
}


def outcome(settings: dict) -> RunOutcome:
    """A longer convolution is better and dearer; a larger learning rate is worse and costs nothing."""
    width = settings["model.short_conv"]
    return RunOutcome(
        "finished",
        metrics={"select/accuracy": width / 40 - settings["train.lr"]},
        cost={"state_bytes": 64.0 * width, "params": 10.0 * width},
    )


class Search:
    def __init__(self, folder, sampler, n_trials=12, **more):
        sweep = tuned(folder, n_trials, **{**SEARCH, "search__sampler": sampler, **more})
        self.arm_cell, self.folder, self.records = plan(sweep).arm_cells[0], folder, {}

    def open(self) -> Tuning:
        return Tuning.open(self.arm_cell, open_journal(self.folder / "optuna.journal"), self.records.get)

    def finish(self) -> Tuning:
        tuning = self.open()
        while (run := tuning.next_run()) is not None:
            self.records[run.key] = outcome(run.settings)
            tuning.tell(run, self.records[run.key])
        return tuning


def values_of(tuning: Tuning) -> list[tuple[float, float]]:
    return [
        (found.metrics["select/accuracy"], found.cost["state_bytes"])
        for found in map(outcome, (run.settings for run in tuning.runs.values()))
    ]


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii", "spread"])
def test_the_front_is_kept_and_its_best_end_is_chosen(tmp_path, sampler):
    search = Search(tmp_path, sampler)
    tuning = search.finish()
    points = values_of(tuning)
    assert len(points) == 12
    best = {p for p in points if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points)}
    found = tuning.choice.front
    assert {tuple(point["values"].values()) for point in found} == best
    assert tuning.choice.value == max(accuracy for accuracy, _ in points)
    assert tuning.choice.key in {point["key"] for point in found}
    again = search.open()
    assert again.next_run() is None
    assert again.choice == tuning.choice
    (search.folder / "optuna.journal").unlink()
    assert search.finish().choice == tuning.choice


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsgaii", "random"])
def test_what_breaks_a_constraint_is_never_chosen(tmp_path, sampler):
    search = Search(tmp_path, sampler, search__constraints=["cost/params <= 200"])
    tuning = search.finish()
    assert tuning.choice.settings["model.short_conv"] <= 20
    assert all(point["settings"]["model.short_conv"] <= 20 for point in tuning.choice.front)
    (search.folder / "optuna.journal").unlink()
    assert search.finish().choice == tuning.choice


def test_constraints_that_nothing_meets(tmp_path):
    tuning = Search(tmp_path, "tpe", n_trials=3, search__constraints=["cost/params <= 2"]).finish()
    assert tuning.choice.settings is None
    assert tuning.choice.front == ()
    assert tuning.choice.reason == ("not run: none of 3 tuning trials can be chosen (3 outside the constraints)")


@pytest.mark.parametrize("seed", range(20))
def test_the_front_against_its_definition(seed):
    rng = random.Random(seed)
    points = [(rng.randint(0, 4), rng.randint(0, 4), rng.randint(0, 4)) for _ in range(rng.randint(1, 25))]

    def beats(a, b):
        at_least = a[0] >= b[0] and a[1] <= b[1] and a[2] >= b[2]
        return at_least and (a[0] > b[0] or a[1] < b[1] or a[2] > b[2])

    expected = [i for i, p in enumerate(points) if not any(beats(q, p) for q in points)]
    assert undominated(points, ["maximize", "minimize", "maximize"]) == expected


def test_a_constraint_on_an_unknown_value_is_broken():
    assert Constraint.parse("cost/params<=1e3").violation(RunOutcome("finished")) == float("inf")
    assert (
        Constraint.parse("select/accuracy >= 0.5").violation(RunOutcome("finished", metrics={"select/accuracy": 0.75}))
        == -0.25
    )


def test_real_trainings_leave_a_front_in_status(tmp_path):
    sweep = tuned(
        tmp_path,
        3,
        base__train__device="cpu",
        seeds=[0],
        search={"sampler": "tpe", "objectives": SEARCH["search__objectives"]},
        tune={"model.short_conv": {"int_uniform": [2, 9]}},
    )
    result, _ = drive(sweep, tmp_path, target=TARGET)
    assert result.outcomes == {"finished": 2 * (3 + 1)}
    for row in sweep_status(tmp_path, "tiny").arm_cells:
        assert 1 <= len(row.front) <= 3
        assert row.settings in [point["settings"] for point in row.front]
        smallest = min(trial.settings["model.short_conv"] for trial in row.trials)
        assert smallest in [point["settings"]["model.short_conv"] for point in row.front]


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        (
            {"objectives": ["cost/params", "cost/state_bytes"]},
            "objectives are 'select/accuracy', which chooses",
        ),
        ({"objectives": ["select/accuracy"]}, "and costs, each once"),
        ({"objectives": ["select/accuracy", "report/loss"]}, "'report/loss' is neither 'select/accuracy' nor a cost"),
        ({"constraints": ["cost/params < 3"]}, "constraints are written"),
        ({"constraints": ["report/accuracy >= 0.3"]}, "constraints are written"),
        ({"objectives": ["select/accuracy", "cost/params"], "pruner": "median"}, "a pruner compares one objective"),
        ({"sampler": "cmaes", "constraints": ["cost/params <= 3"]}, "cmaes knows no constraints"),
    ],
)
def test_bad_objectives_are_one_line(tmp_path, search, expected):
    with pytest.raises(UserError) as caught:
        tuned(tmp_path, search=search)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
