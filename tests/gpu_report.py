"""One page on a GPU machine: what it is, the contract by mixer and implementation, and every other CUDA test."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

CONTRACT = re.compile(r"test_contract_cuda\.py::test_contract\[(?P<subject>.+)-(?P<check>[a-z0-9_]+)\]$")
WRITE_EVERY_S = 5.0
# Workers that have told all results get this long to end; one that a kernel has spoilt may never.
END_WITHIN_S = 60.0
PACKAGES = ("torch", "triton", "fla-core", "flash-linear-attention", "flash-attn")


class GpuReport:
    """A pytest plugin: collects results (those of xdist's workers too) and writes the page.

    Every few seconds, so that what was found is there when the run is killed. The run itself ends once every result
    is in, even if a process that a fault in a kernel has spoilt does not.
    """

    def __init__(self, path: Path, end_within_s: float = END_WITHIN_S) -> None:
        self.path = path
        self.end_within_s = end_within_s
        self.expected: set[str] = set()
        self.results: dict[str, tuple[str, str]] = {}
        self.written_at = 0.0

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.terminal = session.config.pluginmanager.get_plugin("terminalreporter")

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self.expected = set(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.results[report.nodeid] = (report.outcome, reason(report))
            if self.expected and self.expected <= set(self.results):
                self.end_in_time()
        if time.monotonic() - self.written_at > WRITE_EVERY_S:
            self.write(finished=False)

    def end_in_time(self) -> None:
        self.expected = set()
        timer = threading.Timer(self.end_within_s, self.end)
        timer.daemon = True
        timer.start()

    def end(self) -> None:
        self.write(finished=True)
        failed = {nodeid: why for nodeid, (outcome, why) in self.results.items() if outcome == "failed"}
        lines = [f"FAILED {nodeid}: {why}" for nodeid, why in sorted(failed.items())]
        lines.append(f"{len(failed)} of {len(self.results)} tests failed. GPU report: {self.path}")
        lines.append(
            f"All results are in, but a worker did not end within {self.end_within_s:.0f} s: ended without it."
        )
        self.terminal.write_line("\n" + "\n".join(lines), flush=True)
        os._exit(1 if failed else 0)

    @pytest.hookimpl(tryfirst=True)  # before the workers are waited for
    def pytest_sessionfinish(self) -> None:
        self.write(finished=True)

    def write(self, finished: bool) -> None:
        self.path.write_text(page(self.results, finished))
        self.written_at = time.monotonic()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"GPU report: {self.path}")


def reason(report: pytest.TestReport) -> str:
    """One line: why it failed, or was skipped."""
    if report.outcome == "passed":
        return ""
    if report.outcome == "skipped":
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(str(crash.message if crash else report.longrepr).split())


def page(results: dict[str, tuple[str, str]], finished: bool = True) -> str:
    contract: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    others: dict[str, tuple[str, str]] = {}
    for nodeid, result in results.items():
        if found := CONTRACT.search(nodeid):
            contract[found["subject"]][found["check"]] = result
        else:
            others[nodeid] = result
    unfinished = [] if finished else ["", "**Not finished: the run goes on, or was stopped.**"]
    return "\n".join([*machine(), *unfinished, *contract_table(contract), *other_table(others), ""])


def machine() -> list[str]:
    device = torch.cuda.get_device_properties(0)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    now = datetime.datetime.now(datetime.UTC)
    return [
        "# GPU check",
        "",
        f"{now:%Y-%m-%d %H:%M} UTC, commit {commit.stdout.strip() or 'unknown'}, Python {platform.python_version()}",
        "",
        f"- {device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}, "
        f"CUDA {torch.version.cuda}",
        *(f"- {package} {version(package)}" for package in PACKAGES),
    ]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def contract_table(contract: dict[str, dict[str, tuple[str, str]]]) -> list[str]:
    lines = [
        "",
        "## Contract on CUDA",
        "",
        "| mixer and implementation | passed | of | not passed |",
        "|---|---|---|---|",
    ]
    for subject, checks in sorted(contract.items()):
        rest = [f"{name} {outcome}: {why}" for name, (outcome, why) in checks.items() if outcome != "passed"]
        lines.append(f"| {subject} | {len(checks) - len(rest)} | {len(checks)} | {cell('; '.join(rest))} |")
    return lines


def other_table(others: dict[str, tuple[str, str]]) -> list[str]:
    counts = {kind: sum(outcome == kind for outcome, _ in others.values()) for kind in ("passed", "failed", "skipped")}
    lines = ["", "## Kernels against the readable path, and all other CUDA tests", ""]
    lines += [", ".join(f"{n} {kind}" for kind, n in counts.items()), "", "| test | result | |", "|---|---|---|"]
    lines += [f"| {cell(nodeid)} | {outcome} | {cell(why)} |" for nodeid, (outcome, why) in sorted(others.items())]
    return lines


def cell(text: str) -> str:
    return text.replace("|", "\\|")[:600]
