"""The pages in a real browser: live, exported, by keyboard, on a phone, light and dark, and against odd data."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from analysis.comparison import compare
from analysis.palette import COLORS, MARKERS
from analysis.runs import rows_from_records
from tests.analysis.browser import (
    eventually,
    expect,
    expect_in_address,
    open_any,
    open_plot,
    points,
    wait_for_points,
    wait_until,
)
from tests.analysis.conftest import Store, Watched
from tests.analysis.test_dashboard import get

PAGES = ("sweeps", "compare?sweep=mqar_state", "mixers", "mixers?name=fwpkm")


def download(page: Any, button: str) -> bytes:
    with page.expect_download() as caught:
        page.click(button)
    return Path(caught.value.path()).read_bytes()


def test_the_overview_counts_runs_and_shows_the_best(store: Store, dashboard: str, watched: Watched) -> None:
    page = open_any(watched.page, f"{dashboard}/sweeps")
    card = page.locator('article[data-sweep="mqar_state"]')
    expect(card.locator(".bar")).to_have_attribute("aria-label", "52 finished, 1 diverged, 73 to come")
    expect(card).to_contain_text("53 of 126 runs ended")
    card.locator("summary").click()
    _, rows = rows_from_records(store.runs, "mqar_state")
    best = max(row.metrics["select/accuracy"] for row in rows if row.cell == "n_pairs=64" and row.outcome == "finished")
    top = card.locator("tr", has_text="attention").locator("td").nth(2)
    expect(top).to_have_text(re.compile("^" + re.escape(f"{best:.4g}"[:5])))
    expect(top).to_have_class("top")
    page.fill("#query", "hostile")
    expect(page.locator("article")).to_have_count(1)
    expect_in_address(page, "q=hostile")
    page.fill("#query", "")
    for name in ("mqar_state", "hostile"):
        page.get_by_label(f"Choose {name} for").check()
    page.click("#together")
    wait_for_points(page)
    expect(page.locator("#title")).to_have_text("2 sweeps")
    assert watched.errors == []


def test_a_sweep_that_goes_on_is_followed_without_reloading(store: Store, dashboard: str, watched: Watched) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store.uri)
    metric = {"select": "select/accuracy", "report": "report/accuracy", "direction": "maximize"}
    experiment = client.create_experiment("live", tags={f"mixlab.metric.{n}": v for n, v in metric.items()})

    def begin(seed: int) -> str:
        tags = {"arm": "softmax", "cell": "all", "role": "replicate", "seed": str(seed), "key": f"k{seed}"}
        tags |= {"pattern": "softmax", "factors": "{}"}
        return client.create_run(experiment, tags={f"mixlab.{n}": v for n, v in tags.items()}).info.run_id

    def end(run: str, value: float) -> None:
        for name, number in {"select/accuracy": value, "report/accuracy": value, "cost/state_bytes": 64.0}.items():
            client.log_metric(run, name, number)
        client.set_tag(run, "mixlab.outcome", "finished")
        client.set_terminated(run)

    end(begin(0), 0.25)
    second = begin(1)
    page = open_any(watched.page, f"{dashboard}/sweeps")
    card = page.locator('article[data-sweep="live"]')
    expect(card).to_contain_text("1 running")
    compared = open_plot(watched.page.context.new_page(), f"{dashboard}/compare?sweep=live&ylog=0")
    eventually(lambda: points(compared), {("softmax", "all"): (64, 0.25)})
    end(second, 0.75)
    expect(card).to_contain_text("2 finished")
    expect(card.locator("h2")).not_to_contain_text("running")
    eventually(lambda: points(compared), {("softmax", "all"): (64, 0.5)})
    expect_in_address(compared, "ylog=0")
    compared.close()
    client.delete_experiment(experiment)
    assert watched.errors == []


def test_several_sweeps_stand_in_one_picture(dashboard: str, watched: Watched) -> None:
    page = open_plot(watched.page, f"{dashboard}/compare?sweep=mqar_state&sweep=hostile&facet=none&color=sweep")
    drawn = "document.getElementById('plot').data.flatMap((t) => t.customdata ?? []).map((who) => who[2])"
    eventually(lambda: set(page.evaluate(drawn)), {"mqar_state", "hostile"})
    expect(page.locator("#plot .subplot")).to_have_count(1)
    expect(page.locator("#key > span")).to_have_text(["mqar_state", "hostile"])
    page.select_option("#facet", "sweep")
    expect(page.locator("#plot .subplot")).to_have_count(2)
    expect_in_address(page, "color=sweep", "facet=sweep")
    assert watched.errors == []


def test_what_is_on_screen_is_saved(store: Store, dashboard: str, watched: Watched) -> None:
    page = open_plot(
        watched.page, f"{dashboard}/compare?sweep=mqar_state&cell=n_pairs%3D8&arm=FwPKM&arm=linear&x=report/loss"
    )
    rows = list(csv.DictReader(io.StringIO(download(page, "#save-csv").decode())))
    saved, found = rows_from_records(store.runs, "mqar_state")
    lines = [x for x in compare(saved, found, "report/loss") if x.arm in ("FwPKM", "linear") and x.cell == "n_pairs=8"]
    assert [(row["arm"], float(row["report/accuracy"]), float(row["report/loss low"])) for row in rows] == [
        (line.arm, line.metrics["report/accuracy"].mean, line.metrics["report/loss"].low) for line in lines
    ]
    assert download(page, "#save-png").startswith(b"\x89PNG")
    svg = download(page, "#save-svg")
    assert svg.startswith(b"<svg")
    assert b"n_pairs=8" in svg
    assert svg.count(b">FwPKM<") == svg.count(b">linear<") == 1  # the key, below the panels
    assert b">attention<" not in svg
    texts = {"=1+2": "'=1+2", "-a": "'-a", 'say "x", y': '"say ""x"", y"', "plain": "plain"}
    for text, field in texts.items():
        got = page.evaluate("text => mixlab.csvField(text)", text)
        assert got.strip('"') == field.strip('"'), text
    assert page.evaluate("mixlab.csvField(-0.5)") == "-0.5"
    assert watched.errors == []


def test_a_mixer_shows_its_contract_costs_and_runs(store: Store, dashboard: str, watched: Watched) -> None:
    page = open_plot(watched.page, f"{dashboard}/mixers?name=fwpkm")
    expect(page.locator("#contract")).to_contain_text("mixlab check fwpkm --json > RUNS/checks/fwpkm.json")
    expect(page.locator("#bench")).to_contain_text("mixlab bench mixers fwpkm --json")
    expect(page.locator("#runs tbody tr").nth(2)).to_be_visible()
    checks = [{"name": "causality", "status": "failed", "message": "<img src=x onerror='window.pwned=1'> at token 3"}]
    (store.runs / "checks").mkdir()
    (store.runs / "checks" / "all.json").write_text(json.dumps([{"name": "fwpkm", "ok": False, "checks": checks}]))
    (store.runs / "checks" / "torn.json").write_text('[{"name": "fwp')
    (store.runs / "bench").mkdir()
    rows = [
        {"label": label, "scene": "prefill", "tokens": tokens, "status": "measured", "seconds": 1e-4 * tokens}
        for label in ("fwpkm(top_k=4)", "fwpkm + unseen_mixer", "<b>fwpkm</b>(")
        for tokens in (512, 2048, 8192)
    ]
    growth = [{"label": "fwpkm(top_k=4)", "cost": "prefill_seconds", "exponent": 1.0, "low": 0.9, "high": 1.1}]
    (store.runs / "bench" / "b.json").write_text(json.dumps({"rows": rows, "growth": growth}))
    page.reload()
    wait_for_points(page)
    expect(page.locator("#contract")).to_contain_text("breaks the contract")
    expect(page.locator("#contract")).to_contain_text("<img src=x")
    expect(page.locator("#bench")).to_contain_text("T^1.00 0.90 to 1.10")
    drawn = "(document.getElementById('bench-plot').data ?? []).map((t) => [t.x, t.y])"
    eventually(lambda: page.evaluate(drawn), [[[512, 2048, 8192], [512e-4, 2048e-4, 8192e-4]]])
    assert "unseen_mixer" not in page.content()
    page.select_option("#y", "cost/flops_per_token")
    expect_in_address(page, "y=cost%2Fflops_per_token")
    page.click("#runs a >> nth=0")
    page.wait_for_selector("#table tr[data-arm]")
    expect_in_address(page, "/compare?sweep=")
    assert page.evaluate("window.pwned") is None
    page = open_any(watched.page, f"{dashboard}/mixers")
    for mixer in ("fwpkm", "softmax", "pkm"):
        expect(page.locator("#all tbody th").get_by_text(mixer, exact=True)).to_be_visible()
    assert watched.errors == []


def test_everything_can_be_reached_and_done_with_the_keyboard(dashboard: str, watched: Watched) -> None:
    page = open_plot(watched.page, f"{dashboard}/compare?sweep=mqar_state")
    expect(page.locator("#findings details").first).to_be_visible()  # all is there, and what has the focus will stay
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(45):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.textContent.trim().slice(0, 20)")
        )
        assert page.evaluate(
            """() => { const e = document.activeElement; if (e === document.body) return true;
                const s = getComputedStyle(e); return s.outlineStyle !== 'none' && s.outlineWidth !== '0px'; }"""
        ), reached[-1]
    assert reached[0] == "Skip to the plot"
    order = ["theme", "x", "xlog", "y", "ylog", "color", "facet", "intervals", "front", "seeds", "save-png", "save-csv"]
    assert [reached.index(name) for name in order] == sorted(reached.index(name) for name in order)
    page.focus("#intervals")
    page.keyboard.press("Space")
    expect_in_address(page, "intervals=0")
    page.focus("#cells summary")
    page.keyboard.press("Enter")
    expect(page.locator("#cells li").first).to_be_visible()
    page.focus("#cells input[type=search]")
    page.keyboard.press("Escape")
    expect(page.locator("#cells li").first).to_be_hidden()
    page.focus("#table a >> nth=0")
    page.keyboard.press("Enter")
    expect(page.locator("#details h3")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#details")).to_be_hidden()
    assert watched.errors == []


CONTRAST = """() => {
  const linear = (v) => (v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((v) => linear(v / 255));
  const light = (text) => { const [r, g, b] = rgb(text); return .2126 * r + .7152 * g + .0722 * b; };
  const back = (e) => {
    const color = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)|transparent/.test(color)) return color;
    return e.parentElement ? back(e.parentElement) : "rgb(255, 255, 255)";
  };
  const bad = [];
  for (const e of document.querySelectorAll("p, a, summary, td, th, button, label, h1, h2, .quiet, .state")) {
    if (!e.textContent.trim() || !e.offsetParent || e.closest("svg")) continue;
    const a = light(getComputedStyle(e).color), b = light(back(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push([e.tagName, e.className, e.textContent.trim().slice(0, 30), ratio]);
  }
  return bad;
}"""
UNNAMED = """() => [...document.querySelectorAll("input, select, button, a, summary")]
  .filter((e) => e.offsetParent && !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length))
  .map((e) => e.outerHTML)"""


@pytest.mark.parametrize("address", PAGES)
def test_pages_fit_a_phone_and_can_be_read_light_and_dark(dashboard: str, watched: Watched, address: str) -> None:
    watched.page.set_viewport_size({"width": 375, "height": 700})
    page = open_any(watched.page, f"{dashboard}/{address}")
    if "=" in address:
        wait_for_points(page)
    if address.startswith("compare"):
        expect(page.locator("#findings details").first).to_be_visible()
    for theme in ("light", "dark"):
        page.select_option("#theme", theme)
        expect(page.locator("html")).to_have_attribute("data-theme", theme)
        wait_until(page, "document.documentElement.scrollWidth <= 375")
        eventually(lambda: page.evaluate(CONTRAST), [])
        link = page.get_by_role("link", name="Sweeps").first
        expect(link).to_have_attribute("href", re.compile(f"theme={theme}"))
    eventually(lambda: page.evaluate(UNNAMED), [])
    assert watched.errors == []


def write_odd_sweep(uri: str) -> None:
    """Names, tags and values that nobody would write on purpose."""
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    evil = "<img src=x onerror='window.pwned=1'>"
    client = MlflowClient(tracking_uri=uri)
    metric = {"select": "select/accuracy", "report": "report/accuracy", "direction": evil}
    tags = {f"mixlab.metric.{n}": v for n, v in metric.items()} | {
        "mixlab.question": f"</script>{evil} {{{{1}}}} ${{1}}"
    }
    tags["mixlab.n_runs"] = "-3"
    experiment = client.create_experiment(f"odd {evil} =&?#%", tags=tags)
    arms = [
        evil,
        "</script><script>window.pwned=1</script>",
        "=1+1",
        "",
        "x" * 3000,
        "‮gnp.exe",
        "__proto__",
        "constructor",
    ]
    values = [float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 1e-320, 0.0, None]
    for i, (arm, value) in enumerate(zip(arms, values, strict=True)):
        run = client.create_run(
            experiment,
            run_name=evil,
            tags={
                "mixlab.arm": arm,
                "mixlab.cell": evil if i % 2 else "toString",
                "mixlab.factors": ['{"a<b>": 1e400}', "[1, 2", '"x"', "{}", '{"__proto__": 3}'][i % 5],
                "mixlab.role": "replicate" if i != 3 else evil,
                "mixlab.seed": ["0", "-1", "x", "99999999999999999999"][i % 4],
                "mixlab.outcome": ["finished", evil, "finished", "finished"][i % 4],
                "mixlab.reason": evil,
                "mixlab.pattern": ["softmax(", evil, "a" * 2000, "", "((((", "*3,|+@"][i % 6],
                "mixlab.key": f"key {i}",
                "plain <b>tag</b>": evil,
            },
        ).info.run_id
        if value is not None:
            names = ["select/accuracy", "report/accuracy", "cost/state_bytes", "cost/params", "report/x y-z.w"]
            client.log_batch(run, metrics=[Metric(name, value, 1, 0) for name in names])
        client.log_param(run, "model.pattern", evil)
        client.set_terminated(run)


def test_odd_names_tags_and_values_break_no_page_and_become_no_script(
    store: Store, dashboard: str, watched: Watched
) -> None:
    write_odd_sweep(store.uri)
    for address in ("sweeps/data", "mixers/data"):
        status, _, body = get(f"{dashboard}/{address}")
        assert status == 200
        assert not re.search(r"\b(NaN|Infinity)\b", body)
    name = next(sweep["name"] for sweep in json.loads(get(f"{dashboard}/compare/sweeps")[2]) if "odd" in sweep["name"])
    page = open_any(watched.page, f"{dashboard}/sweeps")
    card = page.locator("article", has_text="odd")
    card.locator("summary").click()
    expect(card).to_contain_text("<img src=x")
    card.locator("h2 a").first.click()
    page.wait_for_selector("#table tr[data-arm]")
    expect(page.locator("#title")).to_contain_text(name)
    for axis in ("cost/state_bytes", "report/x y-z.w"):
        page.select_option("#x", axis)
        for log in ("#xlog", "#ylog"):
            page.locator(log).click()
    page.select_option("#facet", "arm")
    page.check("#seeds")
    page.locator("#table a").first.click()
    page.wait_for_selector("#details h3")
    download(page, "#save-csv")
    page.goto(
        page.evaluate("location.href")
        + "&x=%3Cimg%20src%3Dx%20onerror%3D%22window.pwned%3D1%22%3E&cell=nonsense&facet=constructor&arm=toString"
    )
    wait_until(page, "!document.getElementById('content').hidden")
    open_any(watched.page, f"{dashboard}/mixers")
    page.goto(f"{dashboard}/mixers?name=img")
    wait_until(page, "document.getElementById('status').textContent !== 'Loading …'")
    assert page.evaluate("window.pwned") is None
    assert page.locator("main img, main script, main b").count() == 0
    assert watched.errors == []


def test_the_page_has_the_palette_of_the_figures(dashboard: str, watched: Watched) -> None:
    page = open_any(watched.page, f"{dashboard}/mixers?name=fwpkm")
    assert page.evaluate("mixlab.COLORS") == list(COLORS)
    assert page.evaluate("mixlab.SYMBOLS") == [symbol for symbol, _ in MARKERS]
