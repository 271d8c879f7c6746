"""The dashboard as it is used: the real command, MLflow's real server, a real browser."""

from __future__ import annotations

import gzip
import json
import re
import socket
import sqlite3
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import flask
import pytest

from analysis.comparison import as_json, compare
from analysis.dashboard import app as pages
from analysis.dashboard import mlflow_private
from analysis.dashboard.pages import PAGES
from analysis.dashboard.pages import page as text_of_page
from analysis.dashboard.server import check_store, serve
from analysis.runs import rows_from_records
from experiments.errors import UserError
from tests.analysis.browser import (
    eventually,
    expect,
    expect_in_address,
    open_plot,
    points,
    wait_for_points,
    wait_until,
)
from tests.analysis.conftest import HOSTILE, Store, Watched, free_port


def get(address: str, **headers: str) -> tuple[int, Any, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def test_data_is_what_compare_prints_and_its_runs(store: Store, dashboard: str) -> None:
    status, headers, body = get(f"{dashboard}/compare/data?experiment=mqar_state")
    assert status == 200
    assert headers["Content-Type"] == "application/json"
    values = json.loads(body)
    saved, rows = rows_from_records(store.runs, "mqar_state")
    expected = as_json(compare(saved, rows))
    for line in expected:
        del line["trials"]
    told = [line.pop("told") for line in values["comparisons"]]
    assert values["comparisons"] == expected
    assert told[0] == {"task.n_pairs": ["8"], "train.lr": ["0.001"]}
    assert "runs" not in values
    assert values["tags"] == {"mixlab.data_hash": ["", "abc"], "mixlab.outcome": ["diverged", "finished"]}
    assert values["progress"]["planned"] == 6 * 3 * (4 + 3)
    assert values["references"] == [
        {"axis": name, "label": "chance", "value": 2 / 8192} for name in ("report/accuracy", "select/accuracy")
    ]
    _, _, by_id = get(f"{dashboard}/compare/data?experiment={store.experiment_id}")
    assert by_id == body


def test_runs_and_seeds_are_asked_for_when_they_are_shown(store: Store, dashboard: str) -> None:
    query = urllib.parse.urlencode({"experiment": "mqar_state", "arm": "FwPKM", "cell": "n_pairs=64"})
    runs = json.loads(get(f"{dashboard}/compare/runs?{query}")[2])["runs"]
    _, rows = rows_from_records(store.runs, "mqar_state")
    expected = [row for row in rows if (row.arm, row.cell) == ("FwPKM", "n_pairs=64")]
    assert [(run["seed"], run["outcome"], run["metrics"]) for run in runs] == [
        (row.seed, row.outcome, row.metrics) for row in expected
    ]
    assert all(run["link"] and run["settings"]["train.lr"] == 0.001 for run in runs)
    columns = json.loads(get(f"{dashboard}/compare/seeds?experiment=mqar_state&x=cost/params&y=report/accuracy")[2])
    finished = [row for row in rows if row.outcome == "finished"]
    assert sorted(columns["y"]) == sorted(row.metrics["report/accuracy"] for row in finished)
    assert {len(column) for column in columns.values()} == {len(finished)}


def test_tags_leave_only_runs_that_have_them(dashboard: str) -> None:
    address = f"{dashboard}/compare/data?experiment=mqar_state&tag=mixlab.outcome%3Dfinished"
    lines = json.loads(get(address)[2])["comparisons"]
    assert sum(line["n_diverged"] for line in lines) == 0
    assert sum(line["n_seeds"] for line in lines) == 52
    assert get(f"{dashboard}/compare/data?experiment=mqar_state&tag=oops")[0] == 404
    assert sum(line["n_seeds"] for line in json.loads(get(address + "&tag=x%3Dy")[2])["comparisons"]) == 0


def test_a_browser_that_has_the_answer_gets_no_body(dashboard: str) -> None:
    for address in ("sweeps/data", "compare/data?experiment=mqar_state", "mixers/data"):
        status, headers, body = get(f"{dashboard}/{address}")
        assert status == 200
        etag = headers["ETag"]
        status, headers, body = get(f"{dashboard}/{address}", **{"If-None-Match": etag})
        assert (status, body, headers["ETag"]) == (304, "", etag)
        assert headers["Cache-Control"] == "private, no-cache"


def test_every_page_of_ours_lets_no_script_run_but_its_own_files(dashboard: str) -> None:
    for name in ("sweeps", "compare", "mixers"):
        status, headers, body = get(f"{dashboard}/{name}")
        assert status == 200
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self';" in policy
        assert "connect-src 'self'" in policy
        assert "unsafe" not in policy
        assert re.findall(r"<script[^>]*>(?=[^<])", body) == ['<script id="data" type="application/json">']
        assert not re.search(r"(src|href)=\"(/|https?:)|@[A-Z]+@", body)


def test_sweeps_are_listed_and_mistakes_answered(dashboard: str) -> None:
    _, _, body = get(f"{dashboard}/compare/sweeps")
    assert {"mqar_state", "hostile"} <= {entry["name"] for entry in json.loads(body)}
    status, _, body = get(f"{dashboard}/compare/data?experiment=mqar_stat")
    assert status == 404
    assert "did you mean 'mqar_state'" in json.loads(body)["error"]
    status, _, body = get(f"{dashboard}/compare/data?experiment=mqar_state&x=cost/nothing")
    assert (status, "no such metric or cost" in json.loads(body)["error"]) == (404, True)
    assert get(f"{dashboard}/compare/static/../app.py")[0] == 404
    assert get(f"{dashboard}/compare/static/%2e%2e/app.py")[0] == 404
    assert get(f"{dashboard}/compare/sweeps", Host="evil.example")[0] == 403


def test_nothing_can_be_written_through_our_pages(dashboard: str) -> None:
    for route in (
        "compare",
        "compare/data",
        "compare/static/compare.js",
        "sweeps",
        "sweeps/data",
        "mixers",
        "mixers/data",
    ):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            request = urllib.request.Request(f"{dashboard}/{route}", method=method)
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request, timeout=60)
            with caught.value:
                assert caught.value.code == 405, (route, method)


def test_scripts_and_style_are_kept_for_good_at_addresses_that_change_with_them(
    dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, body = get(f"{dashboard}/compare")
    found = re.findall(r'<(?:script src|link rel="stylesheet" href)="(compare/static/[^"]+)"', body)
    assert [address.split("?")[0] for address in found] == ["compare/static/compare.css", "compare/static/compare.js"]
    for address in found:
        status, headers, whole = get(f"{dashboard}/{address}")
        assert (status, headers["Cache-Control"]) == (200, "public, max-age=31536000, immutable")
    request = urllib.request.Request(f"{dashboard}/{found[1]}", headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert gzip.decompress(response.read()).decode() == whole
    monkeypatch.setitem(PAGES, "compare", ("format.js",))
    assert found[0] in text_of_page("compare")
    assert found[1] not in text_of_page("compare")


def test_the_index_page_links_to_the_comparison_even_for_a_browser_that_cached_it(dashboard: str) -> None:
    status, headers, body = get(f"{dashboard}/", **{"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"})
    assert status == 200
    assert headers["ETag"] is None
    assert 'id="mixlab-compare" href="./sweeps"' in body
    assert body.count("</body>") == 1


def test_the_page_shows_the_points_of_the_store(store: Store, dashboard: str, watched: Watched) -> None:
    page = open_plot(watched.page, f"{dashboard}/compare?sweep=mqar_state")
    saved, rows = rows_from_records(store.runs, "mqar_state")
    lines = {(line.arm, line.cell): line for line in compare(saved, rows)}
    drawn = points(page)
    assert drawn.keys() == lines.keys()
    for who, (x, y) in drawn.items():
        line = lines[who]
        assert y == pytest.approx(line.metrics["report/accuracy"].mean)
        if line.cost["state_bytes"] > 0:
            assert x == pytest.approx(line.cost["state_bytes"])
        else:  # zero has a place of its own, left of everything
            assert 0 < x < 15_360
    assert page.evaluate("document.getElementById('plot').layout.xaxis.type") == "log"
    assert page.evaluate("document.getElementById('plot').layout.xaxis.ticktext[0]") == "0"
    row = page.locator('tr[data-arm="FwPKM"][data-cell="n_pairs=64"]')
    for text in ("2/3", "diverged 1/3", "544 KiB"):
        expect(row).to_contain_text(text)
    assert watched.errors == []
    host = dashboard.removesuffix("/lab")
    assert all(url.startswith((host, "data:")) for url in watched.requests), watched.requests


def marked(page: Any) -> frozenset[tuple[str, str]]:
    """Arms and cells that the table marks as on the Pareto front."""
    found = page.evaluate(
        """() => [...document.querySelectorAll("#table tr[data-arm]")]
            .filter((row) => row.querySelector("td.front").textContent === "●")
            .map((row) => [row.dataset.arm, row.dataset.cell])"""
    )
    return frozenset((arm, cell) for arm, cell in found)


def test_the_front_in_the_browser_is_the_front_of_compare(store: Store, dashboard: str, watched: Watched) -> None:
    page = open_plot(watched.page, f"{dashboard}/compare?sweep=mqar_state")
    saved, rows = rows_from_records(store.runs, "mqar_state")
    fronts = set()
    for x, y in (
        ("cost/state_bytes", "report/accuracy"),
        ("cost/train_tokens_per_s", "report/accuracy"),
        ("cost/flops_per_token", "report/loss"),
        ("report/loss", "select/accuracy"),
    ):
        page.select_option("#x", x)
        page.select_option("#y", y)
        expected = frozenset((line.arm, line.cell) for line in compare(saved, rows, x, y) if line.pareto)
        eventually(lambda: marked(page), expected)
        fronts.add(expected)
    assert len(fronts) == 4  # else the axes would not have mattered
    assert watched.errors == []


def test_axes_cells_and_arms_are_chosen_and_kept_in_the_address(dashboard: str, watched: Watched) -> None:
    page = open_plot(watched.page, f"{dashboard}/compare?sweep=mqar_state")
    page.select_option("#x", "cost/params")
    page.select_option("#y", "select/accuracy")
    page.uncheck("#xlog")
    page.click("#cells summary")
    page.click("#cells button:text('none')")
    page.get_by_label("n_pairs=32").check()
    page.check("#seeds")
    expect_in_address(page, "x=cost%2Fparams", "y=select%2Faccuracy", "xlog=0", "cell=n_pairs%3D32", "seeds=1")
    eventually(lambda: {cell for _, cell in points(page)}, {"n_pairs=32"})
    eventually(lambda: points(page)["attention", "n_pairs=32"][0], 566_000)
    before = points(page)
    page.reload()
    wait_for_points(page)
    eventually(lambda: points(page), before)
    assert page.evaluate("document.getElementById('plot').layout.xaxis.type") == "linear"
    page.locator("#legend button", has_text="attention").click()
    eventually(lambda: len(points(page)), len(before) - 1)
    page.select_option("#x", "factor/task.n_pairs")
    page.click("#cells summary")
    page.click("#cells button:text('all')")
    eventually(lambda: {x for x, _ in points(page).values()}, {8, 32, 64})
    assert watched.errors == []


def test_a_click_shows_the_runs_as_links_into_mlflow(store: Store, dashboard: str, watched: Watched) -> None:
    page = open_plot(watched.page, f"{dashboard}/compare?sweep=mqar_state&cell=n_pairs%3D64&theme=dark")
    page.locator("td.arm a", has_text="FwPKM").click()
    details = page.locator("#details")
    expect(details).to_contain_text("diverged")
    expect(details).to_contain_text("train.lr = 0.001")
    links = details.locator("a[href*='#/experiments']")
    expect(links).to_have_count(3)
    link = links.first.evaluate("a => a.href")
    assert link.startswith(f"{dashboard}/#/experiments/{store.experiment_id}/runs/")
    page.locator("#plot .points path").first.hover(force=True)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(int(part) for part in background[4:-1].split(",")) < 150
    assert watched.errors == []


def test_choosing_another_sweep_and_names_that_are_markup(dashboard: str, watched: Watched) -> None:
    page = open_plot(watched.page, f"{dashboard}/compare?sweep=mqar_state&x=cost/params")
    page.click("#sweeps summary")
    page.get_by_label("mqar_state").uncheck()
    page.get_by_label("hostile").check()
    expect(page.locator("#title")).to_have_text("hostile")
    expect_in_address(page, "sweep=hostile")
    expect(page.locator("#x")).to_have_value("cost/params")
    eventually(lambda: page.locator("#legend button").all_inner_texts(), list(HOSTILE))
    eventually(lambda: {arm for arm, _ in points(page)}, set(HOSTILE))
    assert page.evaluate("window.pwned") is None
    assert watched.errors == []


def test_a_phone_shows_everything_without_scrolling_sideways(dashboard: str, watched: Watched) -> None:
    watched.page.set_viewport_size({"width": 390, "height": 800})
    page = open_plot(watched.page, f"{dashboard}/compare?sweep=mqar_state")
    expect(page.locator("#plot .subplot")).to_have_count(3)
    expect(page.locator("#findings details").first).to_be_visible()
    wait_until(page, "document.documentElement.scrollWidth <= 390")


def test_an_unknown_sweep_is_said_as_text(dashboard: str, watched: Watched) -> None:
    watched.page.goto(f"{dashboard}/compare?sweep=%3Cimg%20src%3Dx%20onerror%3D'window.pwned%3D1'%3E")
    status = watched.page.locator("#status.error")
    expect(status).to_contain_text("no sweep")
    expect(status).to_contain_text("<img")
    assert watched.page.evaluate("window.pwned") is None


def test_without_a_prefix_the_pages_and_the_link_are_at_the_root() -> None:
    bare = flask.Flask("bare")
    bare.add_url_rule("/", "index", lambda: "<html><body>MLflow</body></html>")
    bare.add_url_rule("/other", "other", lambda: "<html><body>other</body></html>")
    assert "/compare" in pages.add_pages(bare, "", pages.everything)
    client = bare.test_client()
    assert b'href="./sweeps"' in client.get("/").data
    assert b"mixlab-compare" not in client.get("/other").data
    assert client.get("/compare").status_code == 200
    assert client.post("/compare").status_code == 405


@pytest.mark.filterwarnings("ignore:starlette.middleware.wsgi is deprecated")
def test_private_names_of_mlflow_still_mean_what_we_use_them_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi import FastAPI

    app = mlflow_private.flask_app()
    assert isinstance(app, flask.Flask)
    rules = {rule.rule for rule in app.url_map.iter_rules()}
    assert {"/", "/health"} <= rules
    assert not any(rule.startswith("/compare") for rule in rules)
    monkeypatch.setenv("_MLFLOW_SGI_NAME", "uvicorn")
    assert isinstance(mlflow_private.server_app(app), FastAPI)
    monkeypatch.setenv("_MLFLOW_SGI_NAME", "gunicorn")
    assert mlflow_private.server_app(app) is app
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", "sqlite:///x.db")
    assert mlflow_private.store_uri() == "sqlite:///x.db"
    monkeypatch.setenv("_MLFLOW_STATIC_PREFIX", "/lab/")
    assert mlflow_private.static_prefix() == "/lab"
    monkeypatch.delenv("_MLFLOW_STATIC_PREFIX")
    assert mlflow_private.static_prefix() == ""


def test_private_names_of_mlflow_are_used_in_one_file_only() -> None:
    folder = Path(pages.__file__).parent.parent
    for path in folder.rglob("*.py"):
        if path.name != "mlflow_private.py":
            text = path.read_text()
            assert "mlflow.server" not in text.replace("group `mlflow.app`", ""), path
            assert "_MLFLOW" not in text, path


def test_a_port_that_is_taken_is_one_line(store: Store) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: can't listen on 127.0.0.1: .*choose another"):
            serve(store=store.uri, runs=store.runs, port=port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_address_that_others_can_reach_needs_a_word(store: Store, host: str) -> None:
    with pytest.raises(UserError, match=r"there is no login.*--allow-public"):
        serve(store=store.uri, runs=store.runs, host=host, port=free_port())


@pytest.mark.parametrize("prefix", ["lab", "/la{b}", "/lab?x", "/l b"])
def test_a_prefix_that_is_no_path_is_refused(store: Store, prefix: str) -> None:
    with pytest.raises(UserError, match="--static-prefix"):
        serve(store=store.uri, runs=store.runs, static_prefix=prefix)


def test_stores_that_cannot_be_served_are_one_line_and_nothing_is_created(tmp_path: Path) -> None:
    text, other = tmp_path / "text.db", tmp_path / "other.db"
    text.write_text("not a database, but long enough to be looked at " * 20)
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE unrelated (x)")
    connection.close()
    cases = {
        f"sqlite:///{tmp_path / 'none.db'}": "no such file; run a sweep first",
        f"sqlite:///{tmp_path}": "no such file",
        f"sqlite:///{text}": "can't be opened as an MLflow store: .*not a database",
        f"sqlite:///{other}": "can't be opened as an MLflow store: no such table",
        "http://tracking.example:5000": "is a server already",
        "just/a/folder": "not a database URL",
        "nosuchdb://x/y": "no driver",
    }
    for uri, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            check_store(uri)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "none.db").exists()


def test_a_password_in_the_address_of_a_store_is_not_repeated() -> None:
    with pytest.raises(UserError) as caught:
        check_store("postgresql+nosuch://user:secret@127.0.0.1:1/db")
    assert "secret" not in str(caught.value)
