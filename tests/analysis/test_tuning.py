from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from analysis.comparison import compare
from analysis.runs import RunRow
from analysis.stats.tolerance import Tolerated, tolerated
from analysis.tuning import Tuning, edge_notes, equal_tuning, too_few_values, tunings
from sweeps.saved import SavedSweep
from tests.analysis.test_comparison import SAVED, row

RATES = (1e-4, 1e-3, 1e-2, 1e-1)
TUNED = dataclasses.replace(
    SAVED,
    arms={"a": "softmax"},
    cells={"n_pairs=8": {"task.n_pairs": 8}},
    budget={"max_steps": 10, "tune_trials": 4},
    tune={"train.lr": {"log_uniform": [1e-4, 1e-1]}},
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # best in the middle: 0.95 is crossed halfway to 0.9 on each side, on a log scale
        ([0.5, 1.0, 0.9, 0.1], (1e-3, 10**-3.1, 10**-2.5, False, False, "")),
        ([0.9, 0.96, 1.0, None], (1e-2, 10 ** (-3 - 1 / 6), 1e-2, False, False, "")),  # never towards one that diverged
        ([0.1, 0.2, 0.4, 0.8], (1e-1, 10**-1.1, 1e-1, False, True, "high")),
        ([1.0, 1.0, 1.0, 1.0], (1e-3, 1e-4, 1e-1, True, True, "")),  # nothing to see, so no edge
        ([1.0, None, None, 1.0], (1e-4, 1e-4, 1e-4, True, False, "")),
        ([None, 0.3, 0.2, 0.1], (1e-3, 1e-3, 10 ** (-3 + 0.15), False, False, "")),
    ],
)
def test_the_range_that_does_nearly_as_well(values: list[float | None], expected: tuple[Any, ...]) -> None:
    found = tolerated(RATES, values, sign=1, log=True)
    assert found is not None
    assert found == Tolerated(*(pytest.approx(part) if isinstance(part, float) else part for part in expected))


def test_lower_may_be_better_and_scales_may_be_linear() -> None:
    found = tolerated([0.0, 1.0, 2.0], [2.0, 2.2, 1.0], sign=-1, log=False)
    assert found is not None
    assert (found.best, found.low, found.edge) == (2.0, pytest.approx(2 - 0.05 / 1.2), "high")
    assert tolerated([1.0, 2.0], [None, None], sign=1, log=False) is None


def trials(values: list[float | None], *, lr_used: float = 1e-3, steps: int = 10, **other: Any) -> list[RunRow]:
    shared = {"task.name": "mqar", "task.vocab_size": 64, "train.max_steps": steps}
    rows = [
        row("a", 1_000_003, value, role="tuning", key=f"t{lr}", settings={**shared, "train.lr": lr}, **other)
        for lr, value in zip(RATES, values, strict=False)
    ]
    rows = [dataclasses.replace(each, metrics={"select/accuracy": v}) for each, v in zip(rows, values, strict=False)]
    return [*rows, row("a", 0, 0.9, settings={**shared, "train.lr": lr_used})]


def tuned(rows: list[RunRow], saved: SavedSweep = TUNED) -> tuple[Tuning, tuple[str, ...]]:
    found = tunings(saved, [each for each in rows if each.role == "replicate"], compare(saved, rows))
    return found[0], equal_tuning(saved, rows, found)[1]


def test_a_tuning_in_order() -> None:
    found, faults = tuned(trials([0.5, 1.0, 0.9, None]))
    assert (found.n_planned, found.n_finished, found.ended) == (4, 3, {"finished": 3, "diverged": 1})
    assert (found.best, found.chosen, found.chosen_is_best) == (1.0, {"train.lr": 1e-3}, True)
    (rate,) = found.sensitivity
    assert (rate.setting, rate.best, rate.edge) == ("train.lr", 1e-3, "")
    assert rate.ratio == pytest.approx(10**0.6)
    assert faults == ()
    assert edge_notes([found]) == ()


def test_an_optimum_at_the_edge_is_told_unless_only_two_values_were_tried() -> None:
    found, _ = tuned(trials([0.1, 0.2, 0.4, 0.8], lr_used=1e-1))
    assert edge_notes([found]) == ("a, n_pairs=8: best lr 0.1 is the highest tried",)
    two, _ = tuned(trials([0.1, 0.2], lr_used=1e-3), dataclasses.replace(TUNED, budget={"tune_trials": 2}))
    assert edge_notes([two]) == ()
    assert too_few_values([two]) == ("train.lr",)
    assert two.sensitivity[0].ratio is None


def test_each_way_in_which_tuning_was_not_equal_is_told() -> None:
    _, faults = tuned(trials([0.5, 1.0, 0.9], lr_used=1e-2))
    assert faults == (
        "a, n_pairs=8: 3 of 4 tuning trials run",
        "a, n_pairs=8: replicates do not use the trial that is best by select/accuracy",
    )
    _, faults = tuned(trials([0.5, 1.0, 0.9, 0.1], outcome="failed"))
    assert "a, n_pairs=8: 4 failed of 4 tuning trials, for no fault of the arm's" in faults
    other = trials([0.5, 1.0, 0.9, 0.1], steps=20)[:1]
    _, faults = tuned([*trials([0.5, 1.0, 0.9, 0.1])[1:], *other])
    assert faults == ("n_pairs=8: runs differ in train.max_steps",)
    nothing_tuned = dataclasses.replace(SAVED, budget={"max_steps": 10})
    assert tunings(nothing_tuned, [], compare(nothing_tuned, [])) == ()
