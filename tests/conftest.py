"""Tests marked ``cuda``: skipped without a device; ``--gpu-report FILE`` writes what they found as one page."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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
        take_the_first_configuration()
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(GpuReport(path), "gpu_report")


def take_the_first_configuration() -> None:
    """Kernels run as the first of their configurations that fits the card, instead of timing dozens, each compiled:
    what is asked here is whether they are right. Tuned ones differ in tile sizes and stages."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.errors import OutOfResources

    tune = Autotuner.run

    def run(self: Autotuner, *args: Any, **options: Any) -> Any:
        every = self.configs
        try:
            # A larger call may not fit what a smaller one did: each starts from the first.
            for config in every[:-1]:
                self.configs = [config]
                try:
                    return tune(self, *args, **options)
                except OutOfResources:
                    continue
            self.configs = every[-1:]
            return tune(self, *args, **options)
        finally:
            self.configs = every

    Autotuner.run = run


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
