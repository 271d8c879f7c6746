from __future__ import annotations

import json
import random
import time
import tomllib
from pathlib import Path

from analysis.comparison import compare
from analysis.findings import as_json, findings, json_lines
from analysis.method import method
from analysis.payload import payload
from analysis.runs import RunRow, rows_from_records
from analysis.toml_text import toml_text
from sweeps.definition import DEFINITIONS, load_sweep
from sweeps.saved import SavedSweep
from tests.analysis import planted


def test_everything_not_in_a_mean_is_listed(tmp_path: Path) -> None:
    planted.write_records(tmp_path, planted.plan())
    saved, rows = rows_from_records(tmp_path, "mqar_state")
    found = findings(saved, rows, compare(saved, rows))
    assert [(each.arm, each.cell, each.seed, each.outcome) for each in found.exclusions] == [
        ("FwPKM", "n_pairs=64", 2, "diverged"),
        ("gated DeltaNet", "n_pairs=64", 0, "missing"),
    ]
    assert found.exclusions[0].reason == "loss is NaN at step 120"
    assert found.exclusions[1].key == planted.key("gated DeltaNet", 64, 0)
    text = json.dumps(method(saved, rows, found))
    assert "54 replicates planned, 52 finished; in no mean: 1 diverged, 1 missing, all listed" in text
    # the plan promises 4 tuning trials; there is none
    assert "TUNING WAS NOT EQUAL" in text


def test_json_of_findings_is_plain_and_each_line_has_its_own(tmp_path: Path) -> None:
    planted.write_records(tmp_path, planted.plan())
    saved, rows = rows_from_records(tmp_path, "mqar_state")
    lines = compare(saved, rows)
    found = findings(saved, rows, lines)
    values = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert set(values) == {"paired", "pareto_probability", "bootstrap", "capacity", "tuning", "exclusions"}
    assert values["paired"]["n_comparisons"] == 3 * 15
    by_name = {(each["arm"], each["cell"]): each for each in json_lines(lines, found)}
    fwpkm = by_name["FwPKM", "n_pairs=64"]
    assert [each["outcome"] for each in fwpkm["exclusions"]] == ["diverged"]
    assert {each["b"] for each in fwpkm["paired"]} == {"attention", "window 16", "linear", "gated DeltaNet"}
    assert 0 <= fwpkm["pareto_probability"] <= 1
    assert fwpkm["capacity"][0]["thresholds"][0]["accuracy"] == 0.9


def test_a_saved_definition_alone_repeats_the_sweep(tmp_path: Path) -> None:
    for source in sorted(DEFINITIONS.glob("*.toml")):
        sweep = load_sweep(source, {"budget.max_steps": 7, "seeds": [3, 4]})
        kept = sweep.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={"experiment"})
        path = tmp_path / source.name
        path.write_text(toml_text(json.loads(json.dumps(kept))), encoding="utf-8")
        assert load_sweep(path) == sweep.model_copy(update={"experiment": None})


def test_toml_of_odd_names_and_values() -> None:
    values = {
        "name": 'a "quoted" \\ name\n',
        "arms": {"a b": {"mixer": "m(x=1)", "train.lr": 1e-05}, "c+d": {"free": {"name": "w", "at_most": 3}}},
        "tune": {"train.lr": {"log_uniform": [1e-4, 0.5]}},
        "vary": {"model.short_conv": [2, 3]},
        "base": {"model": {"d_model": 8}, "train": {"stop": {"metric": "x", "threshold": 0.9}, "compile": False}},
    }
    assert tomllib.loads(toml_text(values)) == values


def big_sweep(n_arms: int, n_cells: int, n_seeds: int) -> tuple[SavedSweep, list[RunRow]]:
    rng = random.Random(0)
    saved = planted.plan(arms={f"arm {i}": "softmax" for i in range(n_arms)}, pairs=tuple(range(2, 2 + n_cells)))
    rows = [
        RunRow(
            arm=arm,
            cell=cell,
            factors=factors,
            role="replicate",
            seed=seed,
            outcome="finished" if rng.random() > 0.02 else "diverged",
            reason="",
            pattern=pattern,
            metrics={
                f"{split}/{name}": rng.random() for split in ("select", "report") for name in ("accuracy", "loss")
            },
            cost={name: rng.random() for name in ("state_bytes", "params", "train_tokens_per_s", "flops_per_token")},
            settings={f"model.setting_{i}": i for i in range(60)} | {"task.name": "mqar", "task.vocab_size": 512},
            link="",
            key=f"{arm}{cell}{seed}",
            data_hash="abc",
        )
        for arm, pattern in saved.arms.items()
        for cell, factors in saved.cells.items()
        for seed in range(n_seeds)
    ]
    return saved, rows


def test_ten_thousand_runs_are_compared_fast() -> None:
    saved, rows = big_sweep(10, 100, 10)
    started = time.process_time()
    lines = compare(saved, rows)
    found = findings(saved, rows, lines)
    seconds = time.process_time() - started
    assert len(found.paired) <= 3000
    assert len(found.pareto_probability) == 1000
    assert seconds < 4.0  # about 1.2 on an idle core
    assert len(payload(saved, rows, lines, found)["runs"]) == 10_000
