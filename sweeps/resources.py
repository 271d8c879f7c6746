"""How many workers a machine takes, and what each of them gets."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sweeps.plan import Plan


@dataclass(frozen=True)
class Resources:
    """Workers, torch threads of each, and the GPUs that are dealt out to them in turn (none: as torch finds them)."""

    n_workers: int
    n_threads: int
    gpus: tuple[str, ...] = ()


def resources_for(plan: Plan, n_workers: int | None, n_runs: int) -> Resources:
    """Default: a worker per core, or per GPU where runs go to GPUs; never more than there are runs.

    Several workers share a GPU when ``n_workers`` says so. Runs that name their GPU (``cuda:1``) find all of them.
    """
    devices = {arm_cell.values["train"].get("device", "auto") for arm_cell in plan.arm_cells}
    gpus = () if devices == {"cpu"} else _visible_gpus()
    wanted = n_workers or len(gpus) or n_cores()
    n_workers = max(1, min(wanted, n_runs))
    named = any(device.startswith("cuda:") for device in devices)
    return Resources(n_workers, max(1, n_cores() // n_workers), () if named else gpus)


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _visible_gpus() -> tuple[str, ...]:
    """Names of the GPUs as CUDA_VISIBLE_DEVICES takes them."""
    import torch  # counting does not create a context on them

    n_gpus = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(named.split(",")[:n_gpus]) if named else tuple(str(index) for index in range(n_gpus))
