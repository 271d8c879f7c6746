from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from analysis.comparison import compare
from analysis.page import report_page, script_json
from analysis.payload import payload
from analysis.runs import rows_from_records
from tests.analysis import planted
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
    watched.page.goto(address)
    watched.page.wait_for_selector("#plot .points path", state="attached")
    assert watched.page.locator("#table tbody tr[data-arm]").count() == 12
    assert watched.page.locator("#question").inner_text() == values["sweep"]["question"]
    watched.page.select_option("#x", "cost/params")
    watched.page.wait_for_function("location.hash.includes('x=cost%2Fparams')")
    watched.page.reload()
    watched.page.wait_for_selector("#plot .points path", state="attached")
    assert watched.page.input_value("#x") == "cost/params"
    assert watched.errors == []
    assert {url.split("#")[0] for url in watched.requests if not url.startswith("data:")} == {address}


def test_names_stay_text_everywhere(tmp_path: Path, watched: Watched) -> None:
    address, _ = write_report(tmp_path, HOSTILE, (8,))
    page = watched.page
    page.goto(address)
    page.wait_for_selector("#plot .points path", state="attached")
    assert page.locator("#legend button").all_inner_texts() == list(HOSTILE)
    assert [text.strip() for text in page.locator("td.arm").all_inner_texts()] == list(HOSTILE)
    n_traces = page.evaluate("document.getElementById('plot').data.length")
    for arm in HOSTILE:
        page.evaluate("Plotly.Fx.unhover('plot')")
        curve = page.evaluate(
            "arm => document.getElementById('plot').data.findIndex(t => t.customdata?.[0]?.[0] === arm)", arm
        )
        assert 0 <= curve < n_traces
        page.evaluate("curve => Plotly.Fx.hover('plot', [{curveNumber: curve, pointNumber: 0}])", curve)
        first = page.locator("#plot .hovertext text.nums tspan.line").first
        assert arm in first.text_content().replace("\u00a0", " ")
    page.locator("td.arm a").nth(1).click()
    assert page.locator("#details h3").inner_text() == f"{list(HOSTILE)[1]}, n_pairs=8"
    assert page.evaluate("window.pwned") is None
    assert page.locator("#plot a, main img, main b").count() == 0
    assert watched.errors == []
