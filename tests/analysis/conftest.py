from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.analysis import planted
from tests.analysis.browser import LIMIT_S

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

CHROMIUM = "/usr/bin/chromium"
# for whoever looks for a test that races: pages whose processor is so many times slower
SLOWDOWN = float(os.environ.get("MIXLAB_BROWSER_SLOWDOWN", "1"))
CHROMIUM_ARGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
]
# names that would be markup, script, template or formula if anything took them for it
HOSTILE = {
    '<img src=x onerror="window.pwned=1">': "softmax",
    "</script><script>window.pwned=1</script>": "linear_attention",
    '<a href="javascript:window.pwned=1">x</a> & <b>bold</b>': "gated_deltanet",
    "&lt;i&gt; %{x} {{7*7}} $x^2$ [bold]m[/bold]": "fwpkm",
    "_under'\"`": "pkm:token",
}


class Store(NamedTuple):
    """``runs`` holds the records of ``mqar_state``; the store holds it too, and ``hostile`` without a plan on disk."""

    runs: Path
    uri: str
    experiment_id: str


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    runs = tmp_path_factory.mktemp("runs")
    uri = f"sqlite:///{runs / 'mlflow.db'}"
    saved = planted.plan()
    planted.write_records(runs, saved)
    artifacts = (runs / "artifacts").as_uri()
    experiment_id = planted.write_mlflow(uri, saved, artifacts)
    planted.write_mlflow(uri, planted.plan("hostile", arms=HOSTILE, pairs=(8,)), artifacts)
    return Store(runs, uri, experiment_id)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# the `mixlab` command without the sub-commands of other packages
COMMAND = """
import sys, click
from analysis.cli import commands
from experiments.errors import UserError
try:
    click.Group(commands={command.name: command for command in commands})()
except UserError as error:
    print(f"mixlab: {error}", file=sys.stderr)
    sys.exit(2)
"""


@cache
def _foreign_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mixlab-elsewhere-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("analysis", "experiments", "mixers", "sweeps"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('a folder of the user')\n")
    return folder


def start_dashboard(*options: str) -> subprocess.Popen[str]:
    """The real command in a process of its own; returns once it says that it answers.

    It stands in a folder with packages of the same names as ours, which are not to be taken for ours.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", COMMAND, "dashboard", *options],
        cwd=_foreign_folder(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if "Ctrl-C ends it" not in line:
        process.kill()
        pytest.fail(line + process.communicate()[0])
    return process


def processes_with(text: str) -> list[int]:
    """Ids of living processes with ``text`` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if text in command:
                found.append(int(entry.name))
    return found


def gone_within(text: str, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if not processes_with(text):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="session")
def dashboard(store: Store) -> Iterator[str]:
    """Address of a running dashboard, under a static prefix as behind a proxy."""
    port = free_port()
    options = ["--runs", str(store.runs), "--port", str(port), "--static-prefix", "/lab"]
    process = start_dashboard(*options, "--store", store.uri)
    yield f"http://127.0.0.1:{port}/lab"
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert gone_within(f"--port {port}", 30.0), "the dashboard left a process behind"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"no browser at {CHROMIUM}")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        context = chromium.new_context(viewport={"width": 1280, "height": 900})
        context.set_default_timeout(1000 * LIMIT_S)
        yield context
        chromium.close()


class Watched(NamedTuple):
    """A page, what its console said and which addresses it asked for."""

    page: Any
    errors: list[str]
    requests: list[str]


@pytest.fixture
def watched(browser: Any) -> Iterator[Watched]:
    page = browser.new_page()
    if SLOWDOWN > 1:
        browser.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": SLOWDOWN})
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    yield Watched(page, errors, requests)
    page.close()
