"""The machine that a benchmark ran on, and what else it was doing."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from experiments.environment import environment


def machine_of(device: str) -> dict[str, Any]:
    """JSON values, with the load when it started."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {**environment(device), "cpu": cpu, "load_average": os.getloadavg()}
