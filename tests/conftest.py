"""Tests marked ``cuda``: skipped without a device; ``--gpu-report FILE`` writes what they found as one page.

With several processes (``--dist loadgroup``) tests are dealt out by tests/scheduling.py.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mixers.kernels.untuned import take_the_first_configuration
from tests.gpu_report import GpuReport


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", type=Path, metavar="FILE", help="write the results of the cuda tests to FILE")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--gpu-report")
    if path is None:
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError("--gpu-report: this machine has no usable CUDA device; mixlab doctor says why")
    if importlib.util.find_spec("triton") is not None:
        # What is asked here is whether kernels are right.
        take_the_first_configuration()
    if not hasattr(config, "workerinput"):
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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadgroup":
        return None
    from tests.scheduling import Scheduling

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        from tests.scheduling import rank

        items.sort(key=rank)
    for item in items:
        if not item.get_closest_marker("cuda"):
            continue
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
