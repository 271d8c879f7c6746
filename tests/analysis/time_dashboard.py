"""How long our pages take over a large store, in a real browser: seconds to the first view, milliseconds to a filter.

python -m tests.analysis.big_store FOLDER
python -m tests.analysis.time_dashboard FOLDER [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import time
import urllib.request
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from tests.analysis.conftest import CHROMIUM, CHROMIUM_ARGS, free_port, start_dashboard

# runs `act`, and gives the milliseconds until the browser has painted what it changed
PAINTED = """act => new Promise((done) => {
  const start = performance.now();
  act();
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""
ACTIONS = {
    "hide an arm": "() => document.querySelector('#legend button').click()",
    "show all arms": "() => document.querySelector('#legend-tools button').click()",
    "another axis": "() => { const x = document.getElementById('x'); x.value = x.value === 'cost/params' ? "
    "'cost/state_bytes' : 'cost/params'; x.onchange(); }",
    "one panel for all": "() => { const f = document.getElementById('facet'); f.value = 'none'; f.onchange(); }",
    "panel per sweep": "() => { const f = document.getElementById('facet'); f.value = 'sweep'; f.onchange(); }",
    "panel per arm": "() => { const f = document.getElementById('facet'); f.value = 'arm'; f.onchange(); }",
    "leave out a cell": "() => document.querySelector('#cells input[type=checkbox]').click()",
}


# notes when what makes a page readable has first been painted, in milliseconds since the browser set out for it
SEEN = """selector => {
  const look = () => {
    if (document.querySelector(selector)) setTimeout(() => { window.seenAt = performance.now(); });
    else requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
}"""
PLOT_AND_TABLE = "body:has(#plot .points path):has(#table tr[data-arm])"


def first_view(context: Any, address: str, selector: str) -> float:
    page = context.new_page()
    page.add_init_script(f"({SEEN})({json.dumps(selector)})")
    page.goto(address, wait_until="commit")
    deadline = time.monotonic() + 120
    while (seen_ms := page.evaluate("window.seenAt ?? null")) is None:
        assert time.monotonic() < deadline, f"{address}: {selector} is not there"
        time.sleep(0.1)
    page.close()
    return seen_ms / 1000


def answered(address: str, etag: str = "") -> tuple[float, str]:
    request = urllib.request.Request(address, headers={"If-None-Match": etag} if etag else {})
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            response.read()
            found = response.headers["ETag"]
    except urllib.error.HTTPError as error:
        found = error.headers["ETag"]
        error.close()
    return time.perf_counter() - start, found


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    port = free_port()
    process = start_dashboard(
        "--runs", str(folder), "--store", f"sqlite:///{folder / 'mlflow.db'}", "--port", str(port)
    )
    address = f"http://127.0.0.1:{port}"
    found: dict[str, Any] = {}
    try:
        found["overview, at once after the start, s"], _ = answered(f"{address}/sweeps/data")
        sweeps = [sweep["name"] for sweep in json.load(urllib.request.urlopen(f"{address}/compare/sweeps"))]
        found["comparison of one sweep, first answer, s"], _ = answered(
            f"{address}/compare/data?experiment={sweeps[0]}"
        )
        found["statistics of one sweep, first answer, s"], _ = answered(
            f"{address}/compare/statistics?experiment={sweeps[0]}"
        )
        _, etag = answered(f"{address}/sweeps/data")
        found["poll of the overview, ms"] = _median(
            lambda: 1000 * answered(f"{address}/sweeps/data", etag)[0], 4 * repeats
        )
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
            one, every = f"compare?sweep={sweeps[0]}", "compare?" + "&".join(f"sweep={name}" for name in sweeps)
            for title, path, selector in (
                ("sweeps", "sweeps", "article"),
                ("one sweep", one, PLOT_AND_TABLE),
                (f"all {len(sweeps)} sweeps", every, PLOT_AND_TABLE),
                ("mixers", "mixers", "#all tbody tr"),
                ("one mixer", "mixers?name=fwpkm", "body:has(#plot .points path):has(#runs tbody tr)"),
            ):
                # a browser that has never been here: plotly.js must be fetched, too
                context = browser.new_context(viewport={"width": 1280, "height": 900})
                found[f"first view of {title}, new browser, s"] = first_view(context, f"{address}/{path}", selector)
                views = [first_view(context, f"{address}/{path}", selector) for _ in range(repeats)]
                found[f"first view of {title}, s"] = statistics.median(views)
                context.close()
            for title, path in (("one sweep", one), (f"all {len(sweeps)} sweeps", every)):
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                page.goto(f"{address}/{path}")
                page.wait_for_selector("#plot .points path", state="attached", timeout=120_000)
                page.wait_for_selector("#findings details", state="attached", timeout=120_000)
                # beside the time that passes, the processor's: what other work on the machine does not lengthen
                protocol = page.context.new_cdp_session(page)
                protocol.send("Performance.enable", {"timeDomain": "threadTicks"})
                for action, code in ACTIONS.items():
                    before = _busy_s(protocol)
                    times = [page.evaluate(f"({PAINTED})({code})") for _ in range(repeats)]
                    found[f"{title}: {action}, ms"] = statistics.median(times)
                    found[f"{title}: {action}, ms of processor"] = 1000 * (_busy_s(protocol) - before) / repeats
                found[f"{title}: points"] = page.evaluate("document.querySelectorAll('#plot .points path').length")
                page.close()
            browser.close()
        found["server's memory, MiB"] = _memory_mib(port)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    return found


def _busy_s(protocol: Any) -> float:
    metrics = protocol.send("Performance.getMetrics")["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def _median(measured: Any, repeats: int) -> float:
    return statistics.median(measured() for _ in range(repeats))


def _memory_mib(port: int) -> float:
    sizes = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
                if f"--port\0{port}".encode() in command and b"uvicorn" in command:
                    sizes.append(int((entry / "statm").read_text().split()[1]) * 4096 / 2**20)
            except (FileNotFoundError, ProcessLookupError):
                continue
    return max(sizes, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    for name, value in measure(given.folder.resolve(), given.repeats).items():
        print(f"{name:55} {value:8.3f}" if isinstance(value, float) else f"{name:55} {value:8}")


if __name__ == "__main__":
    main()
