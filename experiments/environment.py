"""What a run ran on: versions, machine, source state."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

PACKAGES = ("torch", "numpy", "mlflow", "optuna", "triton", "flash-linear-attention", "flash-attn", "mixlab")


@functools.cache
def git_state() -> str:
    """Commit of the source tree that this code runs from, with ``+dirty`` if changed; "" without git."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit.stdout.strip() + ("+dirty" if status.stdout.strip() else "")


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(device: str) -> dict[str, object]:
    """JSON values that describe where a run ran."""
    import torch

    values: dict[str, object] = {
        "versions": versions(),
        "platform": platform.platform(),
        "n_cpus": os.cpu_count(),
        "n_threads": torch.get_num_threads(),
        "device": device,
        "git": git_state(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    if device.startswith("cuda"):
        values["gpu"] = torch.cuda.get_device_name(device)
    return values
