from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from analysis.comparison import compare
from analysis.history import MemoryUse
from analysis.page import report_page, script_json
from analysis.payload import payload
from analysis.runs import RunRow, rows_from_records
from sweeps.saved import SavedSweep
from tests.analysis import planted
from tests.analysis.browser import eventually, expect, expect_in_address, open_plot, wait_for_points, wait_until
from tests.analysis.conftest import HOSTILE, Watched


def write_report(folder: Path, arms: dict[str, str], pairs: tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    saved = planted.plan("a report", arms=arms, pairs=pairs)
    planted.write_records(folder, saved)
    _, rows = rows_from_records(folder, saved.name)
    values = payload(saved, rows, compare(saved, rows))
    path = folder / "report.html"
    path.write_text(report_page(values), encoding="utf-8")
    return path.as_uri(), values


@pytest.mark.parametrize("name", ["</script>", "<!--<script>", "]]>", "&amp;", "@SCRIPTS@", "\u2028\u2029"])
def test_no_text_ends_its_script_element(name: str) -> None:
    text = script_json({"arm": name})
    assert json.loads(text) == {"arm": name}
    assert not set("<>&\u2028\u2029") & set(text)


def test_data_with_nan_is_our_bug() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        script_json(float("nan"))


def test_hover_tells_the_settings_in_which_runs_differ(tmp_path: Path) -> None:
    saved = planted.plan()
    planted.write_records(tmp_path, saved)
    _, rows = rows_from_records(tmp_path, saved.name)
    values = payload(saved, rows, compare(saved, rows))
    assert values["told_settings"] == ["task.n_pairs", "train.lr"]
    assert set(values["runs"][0]["settings"]) == {"model.pattern", "seed", "task.n_pairs", "train.lr"}
    assert values["shared_settings"]["task.vocab_size"] == 8192


def test_a_report_opens_from_a_file_with_nothing_else(tmp_path: Path, watched: Watched) -> None:
    address, values = write_report(tmp_path, planted.ARMS, (8, 32))
    page = open_plot(watched.page, address)
    expect(page.locator("#table tbody tr[data-arm]")).to_have_count(12)
    expect(page.locator("#question")).to_have_text(values["sweep"]["question"])
    page.select_option("#x", "cost/params")
    expect_in_address(page, "x=cost%2Fparams")
    page.reload()
    wait_for_points(page)
    expect(page.locator("#x")).to_have_value("cost/params")
    assert watched.errors == []
    assert {url.split("#")[0] for url in watched.requests if not url.startswith("data:")} == {address}


def test_names_stay_text_everywhere(tmp_path: Path, watched: Watched) -> None:
    address, _ = write_report(tmp_path, HOSTILE, (8,))
    page = open_plot(watched.page, address)
    eventually(lambda: page.locator("#legend button").all_inner_texts(), list(HOSTILE))
    eventually(lambda: [text.strip() for text in page.locator("td.arm").all_inner_texts()], list(HOSTILE))
    n_traces = page.evaluate("document.getElementById('plot').data.length")
    for arm in HOSTILE:
        page.evaluate("Plotly.Fx.unhover('plot')")
        curve = page.evaluate(
            "arm => document.getElementById('plot').data.findIndex(t => t.customdata?.[0]?.[0] === arm)", arm
        )
        assert 0 <= curve < n_traces
        page.evaluate("curve => Plotly.Fx.hover('plot', [{curveNumber: curve, pointNumber: 0}])", curve)
        expect(page.locator("#plot .hovertext text.nums tspan.line").first).to_contain_text(arm)
    page.locator("td.arm a").nth(1).click()
    expect(page.locator("#details h3")).to_have_text(f"{list(HOSTILE)[1]}, n_pairs=8")
    assert page.evaluate("window.pwned") is None
    assert page.locator("#plot a, main img, main b").count() == 0
    assert watched.errors == []


def curves_sweep(folder: Path) -> tuple[SavedSweep, list[RunRow], list[MemoryUse]]:
    """Five tuning trials in each arm and cell, the highest learning rate best or diverged; buckets of positions."""
    saved = planted.plan("curves", arms={name: planted.ARMS[name] for name in ("attention", "linear", "FwPKM")})
    saved = dataclasses.replace(saved, tune={"train.lr": {"log_uniform": [1e-4, 1e-2]}})
    planted.write_records(folder, saved)
    _, rows = rows_from_records(folder, saved.name)
    for row in rows:
        row.metrics.update({"report/loss/pos_0_7": 2.0, "report/loss/pos_8_15": 1.0} if row.metrics else {})
        row.settings["train.lr"] = 1e-2
    first = {(row.arm, row.cell): row for row in reversed(rows)}
    for (arm, cell), row in first.items():
        for lr in (1e-4, 1e-3, 1e-2, 1e-1):
            lost = lr > 0.05
            rows.append(
                dataclasses.replace(
                    row,
                    role="tuning",
                    seed=99,
                    key=f"{arm}{cell}{lr}",
                    outcome="diverged" if lost else "finished",
                    metrics={} if lost else {"select/accuracy": 1 + math.log10(lr) / 4},
                    settings=row.settings | {"train.lr": lr},
                )
            )
    use = [
        MemoryUse("FwPKM", "n_pairs=8", seed, "0/token", [10, 20], {"gate_mean": [0.9, 0.1 * seed]}) for seed in (1, 3)
    ]
    return saved, rows, use


def test_curves_are_drawn_from_the_findings_and_follow_what_is_shown(tmp_path: Path, watched: Watched) -> None:
    saved, rows, use = curves_sweep(tmp_path)
    values = payload(saved, rows, compare(saved, rows), history=use)
    path = tmp_path / "curves.html"
    path.write_text(report_page(values), encoding="utf-8")
    page = watched.page
    page.goto(path.as_uri())
    page.wait_for_selector("#figures .figure-plot .points path", state="attached")

    def traces(name: str) -> list[dict[str, Any]]:
        return page.evaluate(
            """name => document.querySelector(`#figures [data-name="curves ${name}"] .figure-plot`).data
            .map(t => ({axis: t.xaxis, x: [...t.x], y: [...t.y], color: t.marker?.color, name: t.name,
                        symbol: t.marker?.symbol, mode: t.mode, text: t.text}))""",
            name,
        )

    titles = [
        "Recall over difficulty",
        "Tuning curves",
        "State over the context T",
        "Quality by position",
        "Use of memory over training",
    ]
    eventually(lambda: page.locator("#figures summary").all_inner_texts(), titles)
    wait_until(page, "[...document.querySelectorAll('#figures .figure-plot')].every((plot) => plot.data?.length > 0)")
    # accuracy over pairs, in the arm's own colour: a seed of FwPKM diverged at 64 pairs
    looks = {arm["name"]: arm for arm in values["sweep"]["arms"]}
    over = [trace for trace in traces("capacity") if trace["axis"] == "x"]
    expected = {each["arm"]: [point["accuracy"]["mean"] for point in each["points"]] for each in values["capacity"]}
    assert [trace["y"] for trace in over] == list(expected.values())
    assert [trace["color"] for trace in over] == [looks[arm]["color"] for arm in expected]
    assert over[2]["symbol"] == ["square", "square", "square-open"]
    # a ring on the chosen trial; what diverged at the foot, none left out
    tuning = [trace for trace in traces("tuning-curves") if trace["axis"] == "x"]
    assert [trace["x"] for trace in tuning if trace["name"] == "chosen"] == [[0.01]] * 3
    assert [(trace["x"], trace["y"]) for trace in tuning if trace["symbol"] == "x-thin"] == [([0.1], [0])] * 3
    assert [trace["x"] for trace in tuning if trace["mode"] == "lines+markers"] == [[0.0001, 0.001, 0.01]] * 3
    assert traces("growth")[0]["y"][1] == 1024 * 256
    assert len([trace for trace in traces("position") if trace["axis"] == "x"]) == 3
    assert [trace["y"] for trace in traces("memory")[:3]] == [[0.9, 0.1], [0.9, pytest.approx(0.3)], [0.9, 0.2]]

    page.select_option("#x", "cost/params")  # the curves do not hang on the axes
    page.locator("#legend button", has_text="FwPKM").click()
    expect(page.locator("#figures > details")).to_have_count(4)
    eventually(lambda: len([trace for trace in traces("capacity") if trace["axis"] == "x"]), 2)
    page.set_viewport_size({"width": 390, "height": 800})
    wait_until(page, "document.documentElement.clientWidth === 390 && document.documentElement.scrollWidth <= 390")
    assert watched.errors == []
