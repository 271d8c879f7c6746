"""The charts of our pages in a real browser: marks stand where their values are, tell about themselves, and zoom."""

from __future__ import annotations

import math
from typing import Any

import pytest

from analysis.comparison import compare
from analysis.runs import rows_from_records
from tests.analysis.browser import eventually, expect, expect_in_address, open_plot, points
from tests.analysis.conftest import HOSTILE, Store, Watched

# of the first panel: every mark's place on the page with what it stands for, and the names along the axes with theirs
DRAWN = """() => {
  const host = document.getElementById("plot"), box = host.querySelector("svg").getBoundingClientRect();
  const centre = (e) => {
    const b = e.getBoundingClientRect();
    return [(b.left + b.right) / 2 - box.left, (b.top + b.bottom) / 2 - box.top];
  };
  const panel = host.querySelector(".subplot"), paths = panel.querySelectorAll(".points path");
  const marks = mixlab.chartOf(host).points.filter((p) => p.panel.index === 0);
  return {
    marks: marks.map((p, i) => ({ who: p.who, at: [p.x, p.y], seen: centre(paths[i]) })),
    names: [...panel.querySelectorAll(":scope > text")].map((text) => [text.textContent, ...centre(text)]),
  };
}"""


def place(page: Any, arm: str, cell: str) -> tuple[float, float]:
    """Where on the page a mark is."""
    return page.evaluate(
        """([arm, cell]) => {
          const box = document.querySelector("#plot svg").getBoundingClientRect();
          const { points } = mixlab.chartOf(document.getElementById("plot"));
          const found = points.find((p) => p.who[0] === arm && p.who[1] === cell);
          return [box.left + found.x, box.top + found.y];
        }""",
        [arm, cell],
    )


def test_marks_stand_where_the_axes_say(store: Store, dashboard: str, watched: Watched) -> None:
    page = open_plot(
        watched.page, f"{dashboard}/compare?sweep=mqar_state&cell=n_pairs%3D8&arm=FwPKM&arm=linear&arm=gated+DeltaNet"
    )
    drawn = page.evaluate(DRAWN)
    saved, rows = rows_from_records(store.runs, "mqar_state")
    lines = {line.arm: line for line in compare(saved, rows) if line.cell == "n_pairs=8"}
    across = {text: x for text, x, _ in drawn["names"] if text.endswith("KiB")}
    up = {float(text): y for text, _, y in drawn["names"] if text in ("0", "0.2", "0.4", "0.6", "0.8", "1.0")}
    assert len(across) >= 2
    assert len(up) == 6
    (low, at_low), *_, (high, at_high) = sorted((float(text.split()[0]), x) for text, x in across.items())
    assert len(drawn["marks"]) == 3
    for mark in drawn["marks"]:
        line = lines[mark["who"][0]]
        share = math.log2(line.cost["state_bytes"] / 1024 / low) / math.log2(high / low)
        expected = (at_low + share * (at_high - at_low), up[0] + line.metrics["report/accuracy"].mean * (up[1] - up[0]))
        assert mark["at"] == pytest.approx(expected, abs=1.5)
        assert mark["seen"] == pytest.approx(mark["at"], abs=2.5)  # a triangle's middle is not that of its box
    # a bar ends where its interval does
    bars = page.evaluate("[...document.querySelectorAll('#plot path.bars')].map((bar) => bar.getBBox().height)")
    heights = sorted(
        (m.high - m.low) * (up[0] - up[1])
        for m in (lines[mark["who"][0]].metrics["report/accuracy"] for mark in drawn["marks"])
    )
    assert sorted(bars) == pytest.approx(heights, abs=0.5)
    assert watched.errors == []


def test_a_mark_tells_about_itself_as_text_and_a_click_picks_it(dashboard: str, watched: Watched) -> None:
    page = open_plot(watched.page, f"{dashboard}/compare?sweep=hostile")
    expect(page.locator("#findings details").first).to_be_visible()  # nothing moves any more
    page.evaluate("document.querySelector('#plot').scrollIntoView()")
    tip = page.locator("#plot .tip")
    for arm in HOSTILE:  # all at one state, a few pixels apart: the nearest tells
        x, y = place(page, arm, "n_pairs=8")
        page.mouse.move(x, y)
        expect(tip.locator("strong")).to_have_text(arm)
        expect(tip).to_be_visible()
    page.mouse.click(x, y)
    expect(page.locator("#details h3")).to_have_text(f"{arm}, n_pairs=8")
    page.mouse.move(1, 1)
    expect(page.locator("#plot .tip")).to_be_hidden()
    assert page.evaluate("window.pwned") is None
    assert page.locator("#plot a, #plot img, main img").count() == 0
    assert watched.errors == []


def test_a_drag_zooms_all_panels_until_the_axes_change(dashboard: str, watched: Watched) -> None:
    page = open_plot(watched.page, f"{dashboard}/compare?sweep=mqar_state")
    expect(page.locator("#findings details").first).to_be_visible()  # nothing moves any more
    page.evaluate("document.querySelector('#plot').scrollIntoView()")

    def ranges() -> list[list[float]]:
        found = "mixlab.chartOf(document.getElementById('plot')).panels.map((p) => [...p.x.range, ...p.y.range])"
        return page.evaluate(found)

    def drag(right: float, up: float) -> None:
        """Over a part of the first panel, from a quarter across and half up."""
        left, top, width, height = page.evaluate(
            """() => {
              const box = document.querySelector("#plot svg").getBoundingClientRect();
              const [panel] = mixlab.chartOf(document.getElementById("plot")).panels;
              return [box.left + panel.left, box.top + panel.top, panel.width, panel.height];
            }"""
        )
        page.mouse.move(left + 0.25 * width, top + 0.5 * height)
        page.mouse.down()
        page.mouse.move(left + (0.25 + right) * width, top + (0.5 - up) * height, steps=4)
        page.mouse.up()

    whole = ranges()
    x0, x1, y0, y1 = whole[0]
    n_marks = page.locator("#plot .points path").count()
    drag(0.25, 0.25)
    part = [x0 + 0.25 * (x1 - x0), x0 + 0.5 * (x1 - x0), y0 + 0.5 * (y1 - y0), y0 + 0.75 * (y1 - y0)]
    eventually(ranges, [pytest.approx(part, abs=0.02 * (x1 - x0))] * len(whole))
    assert page.locator("#plot .points path").count() < n_marks
    assert page.locator("#details").is_hidden()  # a drag is no click
    page.locator("#legend button").first.click()  # what is filtered stays zoomed
    expect_in_address(page, "arm=")
    assert ranges() == [pytest.approx(part, abs=0.02 * (x1 - x0))] * len(whole)
    page.get_by_role("button", name="Reset zoom").click()
    page.locator("#legend-tools button").first.click()
    eventually(ranges, whole)
    drag(0.25, 0.0)  # straight across: a strip
    strip = [*part[:2], y0, y1]
    eventually(ranges, [pytest.approx(strip, abs=0.02 * (x1 - x0))] * len(whole))
    page.select_option("#x", "cost/params")
    expect(page.get_by_role("button", name="Reset zoom")).to_be_hidden()
    eventually(lambda: page.locator("#plot .points path").count(), len(points(page)))
    assert watched.errors == []


def test_dark_pages_swallow_no_mark(dashboard: str, watched: Watched) -> None:
    page = open_plot(watched.page, f"{dashboard}/compare?sweep=mqar_state&theme=dark")
    contrast = """() => {
      const linear = (v) => (v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
      const light = (color) => {
        const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((part) => linear(part / 255));
        return .2126 * r + .7152 * g + .0722 * b;
      };
      const page = light(getComputedStyle(document.body).backgroundColor);
      const drawn = [...document.querySelectorAll("#plot .points path, #legend .swatch path")];
      const marks = drawn.map((mark) => getComputedStyle(mark).fill);
      return Math.min(...marks.map((mark) => (light(mark) + .05) / (page + .05)));
    }"""
    assert page.evaluate(contrast) >= 3.4
    page.select_option("#theme", "light")
    expect(page.locator("#legend .swatch[fill='#5F5F5F']")).to_have_count(1)
