"""The plan of a driver: kept from the last one where nothing has changed, else made in a process of its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from mixers.cli import load_plugins
from sweeps import kept_plan
from sweeps.apart import apart
from sweeps.definition import SweepConfig
from sweeps.plan import Plan, plan
from sweeps.resources import visible_gpus


@dataclass(frozen=True)
class Planned:
    """A plan, and the GPUs of this machine as CUDA_VISIBLE_DEVICES takes them; none for runs on the CPU.

    ``basis``: what it is to be kept under for the next driver, "" where it is kept already or can't be.
    """

    plan: Plan
    gpus: tuple[str, ...]
    basis: str = ""


def planned(sweep: SweepConfig, folder: Path, plugins: tuple[str, ...] = ()) -> Planned:
    """What :func:`sweeps.plan.plan` makes of ``sweep``, with mixers of ``plugins``, or has made: see ``kept_plan``.

    ``folder``: of the sweep's records.
    """
    if "torch" in sys.modules:  # then a plan takes no time
        return _planned(sweep, plugins)
    basis = kept_plan.basis(sweep, plugins)  # before the plan is made: an edit meanwhile is an edit since
    if (kept := kept_plan.read(folder, sweep, basis)) is not None:
        return Planned(*kept)
    found = apart(lambda: _planned(sweep, plugins), f"sweep {sweep.name}: planning")
    return replace(found, basis=basis)


def _planned(sweep: SweepConfig, plugins: tuple[str, ...]) -> Planned:
    load_plugins(plugins)
    made = plan(sweep)
    made.code  # noqa: B018  computed here, where the layers are loaded
    return Planned(made, () if made.devices == {"cpu"} else visible_gpus())
