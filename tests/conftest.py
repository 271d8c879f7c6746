"""Tests marked ``cuda``: skipped without a device; ``--gpu-report FILE`` writes what they found as one page."""

from __future__ import annotations

import os
from collections.abc import Iterator
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A fault in a kernel spoils the process's CUDA context: a worker of xdist then ends, and another goes on."""
    result = yield
    if hasattr(item.config, "workerinput") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.get_closest_marker("cuda"):
            continue
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        # One process tunes a mixer's kernels, once: with --dist loadgroup its tests stay together.
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        group = "-".join(str(parameters[key]) for key in ("name", "impl") if key in parameters) or item.path.name
        if item.config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group(group))
