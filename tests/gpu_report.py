"""One page on a GPU machine: what it is, the contract by mixer and implementation, and every other CUDA test."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

CONTRACT = re.compile(r"test_contract_cuda\.py::test_contract\[(?P<subject>.+)-(?P<check>[a-z0-9_]+)\]$")
WRITE_EVERY_S = 5.0
PACKAGES = ("torch", "triton", "fla-core", "flash-linear-attention", "flash-attn")


class GpuReport:
    """A pytest plugin: collects results (those of xdist's workers too) and writes the page.

    Every few seconds, so that what was found is there when the run is killed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, tuple[str, str]] = {}
        self.written_at = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.results[report.nodeid] = (report.outcome, reason(report))
        if time.monotonic() - self.written_at > WRITE_EVERY_S:
            self.write(finished=False)

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
