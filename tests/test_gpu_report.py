"""The run of a GPU machine ends and says what it found, whatever becomes of the processes that ran the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

CONFTEST = """
import os, time
from pathlib import Path
import pytest
from tests import gpu_report

gpu_report.machine = lambda: ["# no GPU"]

def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(gpu_report.GpuReport(Path("report.md"), end_within_s=1.0))

def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):
        time.sleep(600)
"""

TESTS = """
import os, time
import pytest

@pytest.mark.parametrize("i", range(4))
def test_fine(i):
    pass

def test_kernel_outside_its_memory():
    os._exit(1)

def test_kernel_without_end():
    while True:
        time.sleep(0.1)
"""


def test_crashed_and_endless_kernels_are_failures_of_a_run_that_ends(tmp_path: Path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_kernels.py").write_text(TESTS)
    options = ["-n", "2", "--max-worker-restart", "100", "--timeout-method", "thread", "--timeout", "2"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "."]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 1, done.stdout
    assert "FAILED test_kernels.py::test_kernel_outside_its_memory: worker" in done.stdout
    assert "2 of 6 tests failed" in done.stdout
    assert "a worker did not end within 1 s" in done.stdout
    report = (tmp_path / "report.md").read_text()
    assert "Not finished" not in report
    assert "4 passed, 2 failed" in report
    assert "test_kernel_without_end | failed" in report
