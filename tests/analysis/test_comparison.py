from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from analysis.axes import axis, human
from analysis.comparison import as_json, axis_names, chance_accuracy, check_axis, compare
from analysis.runs import RunRow
from experiments.errors import UserError
from tests.analysis import planted

SAVED = dataclasses.replace(planted.plan(arms={"a": "softmax", "b": "pkm", "c": "fwpkm"}, pairs=(8, 32)), runs=[])


def row(arm: str, seed: int, accuracy: float | None = None, *, pairs: int = 8, **other: Any) -> RunRow:
    values = {
        "arm": arm,
        "cell": f"n_pairs={pairs}",
        "factors": {"task.n_pairs": pairs},
        "role": "replicate",
        "seed": seed,
        "outcome": "finished" if accuracy is not None else "diverged",
        "reason": "",
        "pattern": SAVED.arms[arm],
        "metrics": {} if accuracy is None else {"report/accuracy": accuracy},
        "cost": {"state_bytes": {"a": 100.0, "b": 0.0, "c": 200.0}[arm], "train_tokens_per_s": 10.0},
        "settings": {"task.name": "mqar", "task.vocab_size": 64},
        "link": "",
        "key": f"{arm}{seed}{pairs}",
    }
    return RunRow(**{**values, **other})


def line(lines: list[Any], arm: str, pairs: int = 8) -> Any:
    return next(found for found in lines if (found.arm, found.cell) == (arm, f"n_pairs={pairs}"))


def test_every_arm_and_cell_of_the_plan_has_a_line_in_its_order() -> None:
    lines = compare(SAVED, [row("c", 0, 0.5, pairs=32)])
    assert [(found.arm, found.cell) for found in lines] == [
        (arm, cell) for arm in ("a", "b", "c") for cell in ("n_pairs=8", "n_pairs=32")
    ]
    assert line(lines, "a").notes == ("missing 3/3",)
    assert line(lines, "c", 32).n_seeds == 1
    assert line(lines, "c", 32).factors == {"task.n_pairs": 32}
    assert line(lines, "c", 32).pattern == "fwpkm"


def test_outcomes_are_counted_apart_and_only_finished_replicates_are_averaged() -> None:
    rows = [
        row("a", 0, 0.5),
        row("a", 1),
        row("a", 2, outcome="failed"),
        row("a", 3, 0.9, role="tuning"),
        row("b", 0, 0.1),
        row("b", 1, 0.9, outcome="killed"),
        row("b", 2, 0.9, outcome="unfinished"),
    ]
    lines = compare(SAVED, rows)
    a, b = line(lines, "a"), line(lines, "b")
    assert (a.n_seeds, a.n_planned, a.n_diverged, a.n_failed) == (1, 3, 1, 1)
    assert a.metrics["report/accuracy"].mean == 0.5
    assert a.metrics["report/accuracy"].low is None
    assert a.notes == ("diverged 1/3", "failed 1/3")
    assert b.metrics["report/accuracy"].mean == 0.1
    assert b.notes == ("missing 2/3",)


def test_a_metric_that_a_finished_seed_lacks_is_noted_and_left_out_of_the_mean() -> None:
    rows = [
        row("a", 0, 0.5, metrics={"report/accuracy": 0.5, "report/loss": 1.0}),
        row("a", 1, 0.7, metrics={"report/accuracy": None, "report/loss": 2.0}),
        row("a", 2, 0.7, metrics={"report/accuracy": 0.7}),
    ]
    found = line(compare(SAVED, rows), "a")
    assert found.metrics["report/accuracy"].mean == pytest.approx(0.6)
    assert found.metrics["report/accuracy"].n == 2
    assert found.notes == ("report/accuracy missing in 1/3", "other metrics missing in some seeds: 1")


def test_sizes_that_differ_between_seeds_are_noted() -> None:
    rows = [row("a", 0, 0.5), row("a", 1, 0.5, cost={"state_bytes": 101.0, "train_tokens_per_s": 20.0})]
    found = line(compare(SAVED, rows), "a")
    assert found.notes == ("missing 1/3", "state_bytes differs between seeds")
    assert found.cost == {"state_bytes": 100.5, "train_tokens_per_s": 15.0}


def test_the_front_is_taken_per_cell_and_never_holds_an_arm_without_a_finished_seed() -> None:
    rows = [row("a", 0, 0.5), row("b", 0), row("c", 0, 0.4), row("a", 0, 0.5, pairs=32), row("c", 0, 0.6, pairs=32)]
    lines = compare(SAVED, rows)
    assert [(found.arm, found.cell) for found in lines if found.pareto] == [
        ("a", "n_pairs=8"),
        ("a", "n_pairs=32"),
        ("c", "n_pairs=32"),
    ]
    assert line(lines, "b").cost["state_bytes"] == 0  # what it would cost is known all the same
    # even between two costs, both of which the diverged arm has
    by_cost = compare(SAVED, rows, "cost/state_bytes", "cost/train_tokens_per_s")
    assert not line(by_cost, "b").pareto
    assert line(by_cost, "a").pareto


def test_a_speed_is_better_when_higher_and_a_minimised_metric_when_lower() -> None:
    fast = {"state_bytes": 1.0, "train_tokens_per_s": 20.0}
    rows = [row("a", 0, 0.5), row("c", 0, 0.5, cost=fast)]
    lines = compare(SAVED, rows, "cost/train_tokens_per_s", "report/accuracy")
    assert [found.arm for found in lines if found.pareto] == ["c"]
    metric = {"select": "select/loss", "report": "report/loss", "direction": "minimize"}
    lossy = dataclasses.replace(SAVED, metric=metric)
    losses = [row("a", 0, 0, metrics={"report/loss": 2.0}), row("c", 0, 0, metrics={"report/loss": 3.0})]
    assert [found.arm for found in compare(lossy, losses) if found.pareto] == ["a"]


def test_directions_of_axes() -> None:
    metric = {"select": "select/score", "report": "report/score", "direction": "maximize"}
    directions = {
        "report/score": "maximize",
        "select/score": "maximize",
        "report/score/T64_P4": "maximize",
        "report/accuracy/T64_P4": "maximize",
        "report/loss": "minimize",
        "report/bits_per_byte/pos_0_63": "minimize",
        "cost/state_bytes": "minimize",
        "cost/prefill_tokens_per_s": "maximize",
        "cost/decode_ms_per_token": "minimize",
        "cost/unheard_of": "minimize",
    }
    assert {name: axis(name, metric).direction for name in directions} == directions
    inverted = {**metric, "report": "report/accuracy", "direction": "minimize"}
    assert axis("report/accuracy", inverted).direction == "minimize"


def test_an_unknown_axis_names_the_option_and_near_matches() -> None:
    lines = compare(SAVED, [row("a", 0, 0.5)])
    with pytest.raises(UserError, match=r"--x 'cost/state_byte': .*did you mean 'cost/state_bytes'"):
        check_axis("--x", "cost/state_byte", SAVED, lines)
    check_axis("--y", "report/accuracy", SAVED, compare(SAVED, []))
    assert axis_names(SAVED, lines) == ["cost/state_bytes", "cost/train_tokens_per_s", "report/accuracy"]


def test_chance_is_known_only_when_all_runs_share_one_vocabulary() -> None:
    rows = [row("a", 0, 0.5), row("b", 0, 0.5)]
    assert chance_accuracy(rows) == 2 / 64
    assert chance_accuracy([]) is None
    assert chance_accuracy([*rows, row("a", 1, 0.5, settings={"task.name": "mqar", "task.vocab_size": 128})]) is None
    assert chance_accuracy([row("a", 1, 0.5, settings={"task.name": "text", "task.vocab_size": 257})]) is None


def test_json_holds_no_nan_and_exactly_the_documented_fields() -> None:
    rows = [row("a", 0, 0.5), row("a", 1, 0.7), row("b", 0, 0.1, metrics={"report/accuracy": math.nan})]
    values = json.loads(json.dumps(as_json(compare(SAVED, rows)), allow_nan=False))
    assert len(values) == 6
    counts = {"n_seeds", "n_planned", "n_diverged", "n_failed"}
    fields = {"arm", "cell", "factors", "pattern", "metrics", "cost", "pareto", "notes", "trials"} | counts
    assert set(values[0]) == fields
    assert values[0]["metrics"]["report/accuracy"]["mean"] == pytest.approx(0.6)
    assert sorted(values[0]["metrics"]["report/accuracy"]) == ["high", "low", "mean"]
    assert values[2]["metrics"] == {}
    assert values[2]["pareto"] is False


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "bytes", "0 B"),
        (999, "bytes", "999 B"),
        (1000, "bytes", "0.977 KiB"),
        (9728, "bytes", "9.5 KiB"),
        (1023.9 * 1024, "bytes", "1 MiB"),
        (1_050_112, "bytes", "1 MiB"),
        (999.7, "count", "1 k"),
        (1_234_567, "count", "1.23 M"),
        (0.93449, "fraction", "0.934"),
        (None, "bytes", "–"),
        (math.nan, "count", "–"),
    ],
)
def test_human_numbers(value: float | None, unit: Any, text: str) -> None:
    assert human(value, unit) == text
