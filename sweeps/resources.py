"""How many workers a machine or a cluster takes, and what each of them gets."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from experiments.errors import UserError
from sweeps.plan import Plan


@dataclass(frozen=True)
class Resources:
    """Workers, and the GPUs that are dealt out to them in turn (none: as torch finds them)."""

    n_workers: int
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class RayShare:
    """Workers on a Ray cluster, and what each of them holds: CPUs and GPUs, or fractions of one."""

    n_workers: int
    n_cpus: float
    n_gpus: float = 0.0


def resources_for(
    plan: Plan, n_workers: int | None, n_runs: int, gpus: tuple[str, ...] = (), per_gpu: int | None = None
) -> Resources:
    """Default: as many workers as the cores have room for, each with the plan's threads, or ``per_gpu`` (1) per GPU
    where runs go to GPUs; never more than there are runs.

    ``gpus``: those to use. Several workers share a GPU when ``per_gpu`` or
    ``n_workers`` says so. Runs that name their GPU (``cuda:1``) find all of them.
    """
    devices = plan.devices
    wanted = n_workers or len(gpus) * (per_gpu or 1) or n_cores() // plan.sweep.threads
    n_workers = max(1, min(wanted, n_runs))
    named = any(device.startswith("cuda:") for device in devices)
    return Resources(n_workers, () if named else gpus)


def ray_share(
    plan: Plan, machines: list[dict[str, float]], n_workers: int | None, n_runs: int, per_gpu: int | None = None
) -> RayShare:
    """The same rule for a cluster: as many workers as its CPUs have room for, or ``per_gpu`` (1) per GPU where runs go
    to GPUs.

    ``machines``: the resources of each, as Ray names them. A worker holds a CPU for each of its threads, fewer where
    there are not enough for all workers. :class:`UserError` where GPUs are asked for that the cluster doesn't have.
    """
    n_threads = plan.sweep.threads
    devices = plan.devices
    named = sorted(device for device in devices if device.startswith("cuda:"))
    if named:
        raise UserError(
            f"--ray: runs of this sweep have train.device={named[0]!r}; Ray deals GPUs out: set it to 'cuda'"
        )
    with_gpus = [machine for machine in machines if machine.get("GPU", 0) >= 1]
    n_gpus = sum(int(machine["GPU"]) for machine in with_gpus)
    if n_gpus == 0 and ("cuda" in devices or per_gpu is not None):
        raise UserError("--ray: the cluster has no GPU, and runs of this sweep are to use one")
    if devices == {"cpu"} or n_gpus == 0:
        cpus = [int(machine.get("CPU", 0)) for machine in machines]
        n_workers = max(1, min(n_workers or sum(n // n_threads for n in cpus), n_runs))
        return RayShare(n_workers, _cpus_for(cpus, n_workers, n_threads))
    per_gpu = per_gpu or math.ceil((n_workers or n_gpus) / n_gpus)
    n_workers = max(1, min(n_workers or n_gpus * per_gpu, n_runs))
    cpus = [int(machine.get("CPU", 0)) for machine in with_gpus]
    return RayShare(n_workers, _cpus_for(cpus, n_workers, n_threads), 1 / per_gpu)


def _cpus_for(cpus: list[int], n_workers: int, most: int) -> float:
    """CPUs, at most so many, that each of ``n_workers`` can have on machines with so many; a fraction where it must."""
    for each in range(most, 0, -1):
        if sum(n // each for n in cpus) >= n_workers:
            return float(each)
    # The best fraction leaves nothing over on one of the machines. Ray counts in ten thousandths.
    fractions = {n / k for n in cpus if n for k in range(n, n_workers + 1)}
    fit = [each for each in fractions if sum(math.floor(n / each + 1e-9) for n in cpus) >= n_workers]
    return math.floor(1e4 * max(fit, default=0.0)) / 1e4


def require_gpus(gpus: tuple[str, ...] | None, per_gpu: int | None, visible: tuple[str, ...]) -> None:
    """:class:`UserError` where GPUs of this machine are asked for that aren't there."""
    if gpus is None and per_gpu is None:
        return
    option = "--gpus" if gpus is not None else "--per-gpu"
    if not visible:
        raise UserError(f"{option}: this machine has no usable CUDA device; mixlab doctor says why")
    unknown = [name for name in gpus or () if name not in visible]
    if unknown or len(set(gpus or ())) != len(gpus or ()):
        raise UserError(f"--gpus: {','.join(gpus or ())}: name each once, of {', '.join(visible)}")


def require_sense(
    plan: Plan, n_workers: int | None, gpus: tuple[str, ...] | None, per_gpu: int | None, ray: str | None
) -> None:
    """:class:`UserError` for options that contradict each other or the runs, wherever these will be executed."""
    if n_workers is not None and per_gpu is not None:
        raise UserError("--workers and --per-gpu both set the number of workers; leave one out")
    if ray is not None and gpus is not None:
        raise UserError("--gpus names those of this machine; with --ray, Ray deals them out: leave it out")
    if gpus is None and per_gpu is None:
        return
    option = "--gpus" if gpus is not None else "--per-gpu"
    fixed = sorted(device for device in plan.devices if device == "cpu" or device.startswith("cuda:"))
    if fixed:
        raise UserError(f"{option}: runs of this sweep have train.device={fixed[0]!r}; set it to 'auto' or 'cuda'")


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> tuple[str, ...]:
    """Names of the GPUs as CUDA_VISIBLE_DEVICES takes them."""
    import torch  # counting does not create a context on them

    n_gpus = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(named.split(",")[:n_gpus]) if named else tuple(str(index) for index in range(n_gpus))
