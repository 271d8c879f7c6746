"""Where a sweep's workers are to run: on this machine, or on a Ray cluster. The same sweep, file and records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.executor import Executor
from sweeps.local_executor import LocalExecutor
from sweeps.planning import Planned
from sweeps.resources import ray_share, resources_for


@dataclass(frozen=True)
class Wanted:
    """What the user has asked for; None leaves it to the machine. ``ray``: the address of a cluster, or ``auto``."""

    n_workers: int | None = None
    gpus: tuple[str, ...] | None = None
    per_gpu: int | None = None
    ray: str | None = None


@dataclass(frozen=True)
class Place:
    """A place for ``n_workers`` jobs at a time; ``executor`` starts them."""

    n_workers: int
    executor: Callable[[], Executor]


@contextmanager
def place_for(planned: Planned, wanted: Wanted, n_runs: int, folder: Path, **options: Any) -> Iterator[Place]:
    """Open as long as the sweep runs. ``n_runs`` are missing: without any, nothing is started.

    ``options``: ``plugins``, ``target`` and ``patience_s`` of the executor.
    """
    options["n_threads"] = planned.plan.sweep.threads
    if wanted.ray is None or n_runs == 0:
        gpus = planned.gpus if wanted.gpus is None else wanted.gpus
        resources = resources_for(planned.plan, wanted.n_workers, n_runs, gpus, wanted.per_gpu)
        sizes = {"count": resources.n_workers, "gpus": resources.gpus}
        yield Place(resources.n_workers, lambda: LocalExecutor(folder, **sizes, **options))
        return
    from sweeps.ray_executor import RayExecutor, connected

    with connected(wanted.ray, folder / ".ray.log") as machines:
        share = ray_share(planned.plan, machines, wanted.n_workers, n_runs, wanted.per_gpu)
        yield Place(share.n_workers, lambda: RayExecutor(folder, share, **options))
