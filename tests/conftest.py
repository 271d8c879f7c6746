"""Tests marked ``cuda``: skipped without a device; ``--gpu-report FILE`` writes what they found as one page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu_report import GpuReport


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", type=Path, metavar="FILE", help="write the results of the cuda tests to FILE")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--gpu-report")
    if path is None or hasattr(config, "workerinput"):
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError("--gpu-report: this machine has no usable CUDA device; mixlab doctor says why")
    config.pluginmanager.register(GpuReport(path), "gpu_report")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
