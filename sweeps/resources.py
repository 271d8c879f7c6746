"""How many workers a machine takes, and what each of them gets."""

from __future__ import annotations

import os
from dataclasses import dataclass

from experiments.errors import UserError
from sweeps.plan import Plan


@dataclass(frozen=True)
class Resources:
    """Workers, torch threads of each, and the GPUs that are dealt out to them in turn (none: as torch finds them)."""

    n_workers: int
    n_threads: int
    gpus: tuple[str, ...] = ()


def resources_for(
    plan: Plan,
    n_workers: int | None,
    n_runs: int,
    gpus: tuple[str, ...] | None = None,
    per_gpu: int | None = None,
) -> Resources:
    """Default: a worker per core, or ``per_gpu`` (1) per GPU where runs go to GPUs; never more than there are runs.

    ``gpus``: those to use, None for all that are visible. Several workers share a GPU when ``per_gpu`` or
    ``n_workers`` says so. Runs that name their GPU (``cuda:1``) find all of them.
    """
    devices = _devices(plan)
    if gpus is None:
        gpus = () if devices == {"cpu"} else _visible_gpus()
    wanted = n_workers or len(gpus) * (per_gpu or 1) or n_cores()
    n_workers = max(1, min(wanted, n_runs))
    named = any(device.startswith("cuda:") for device in devices)
    return Resources(n_workers, max(1, n_cores() // n_workers), () if named else gpus)


def require_gpus(plan: Plan, n_workers: int | None, gpus: tuple[str, ...] | None, per_gpu: int | None) -> None:
    """:class:`UserError` where GPUs are asked for that aren't there, or that the runs can't be dealt out to."""
    if gpus is None and per_gpu is None:
        return
    option = "--gpus" if gpus is not None else "--per-gpu"
    if n_workers is not None and per_gpu is not None:
        raise UserError("--workers and --per-gpu both set the number of workers; leave one out")
    devices = _devices(plan)
    fixed = sorted(device for device in devices if device == "cpu" or device.startswith("cuda:"))
    if fixed:
        raise UserError(f"{option}: runs of this sweep have train.device={fixed[0]!r}; set it to 'auto' or 'cuda'")
    visible = _visible_gpus()
    if not visible:
        raise UserError(f"{option}: this machine has no usable CUDA device; mixlab doctor says why")
    unknown = [name for name in gpus or () if name not in visible]
    if unknown or len(set(gpus or ())) != len(gpus or ()):
        raise UserError(f"--gpus: {','.join(gpus or ())}: name each once, of {', '.join(visible)}")


def _devices(plan: Plan) -> set[str]:
    return {arm_cell.values["train"].get("device", "auto") for arm_cell in plan.arm_cells}


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _visible_gpus() -> tuple[str, ...]:
    """Names of the GPUs as CUDA_VISIBLE_DEVICES takes them."""
    import torch  # counting does not create a context on them

    n_gpus = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(named.split(",")[:n_gpus]) if named else tuple(str(index) for index in range(n_gpus))
