"""A sweep's plan, kept beside its records: a driver that is started again needs no torch, which takes seconds to load.

RUNS/<sweep>/.plan.json stands for as long as all that a plan follows from says what it said then; see :func:`basis`.
Keys of runs are computed anew, and a worker still refuses one that its code doesn't give.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import experiments
import mixers
import sweeps
from experiments.records import read_json, write_json
from sweeps.definition import SweepConfig
from sweeps.match import Matched
from sweeps.plan import ArmCell, Plan, cells_of

FILE = ".plan.json"


def basis(sweep: SweepConfig, plugins: tuple[str, ...]) -> str:
    """A hash of all that a plan follows from; "" where that can't be told.

    That is the sweep file with experiment and overrides, this project's code, the packages that are installed, and the
    GPUs that there are. A plugin may import anything: its plans are never kept.
    """
    if plugins:
        return ""
    digest = hashlib.sha256(json.dumps(sweep.model_dump(mode="json"), sort_keys=True).encode())
    for package in (mixers, experiments, sweeps):
        for path in sorted(Path(package.__file__).parent.rglob("*.py")):
            digest.update(f"{path}\n".encode() + path.read_bytes())
    digest.update(json.dumps([sys.version, platform.machine(), _installed(), _gpus()]).encode())
    return digest.hexdigest()


def read(folder: Path, sweep: SweepConfig, basis: str) -> tuple[Plan, tuple[str, ...]] | None:
    """The plan that was kept in ``folder`` on this basis, with the GPUs of the machine, or None."""
    kept = read_json(folder / FILE) if basis else None
    if not isinstance(kept, dict) or kept.get("basis") != basis:
        return None
    return _plan(sweep, kept), tuple(kept["gpus"])


def keep(folder: Path, basis: str, plan: Plan, gpus: tuple[str, ...]) -> None:
    """Keep ``plan`` in ``folder`` for the next driver, where a basis tells when it no longer stands.

    A layer of another package is no part of the basis: that package's code may change without its version.
    """
    if not basis or any(not name.endswith(".py") for name in plan.code):
        return
    kept = {
        "basis": basis,
        "gpus": list(gpus),
        "settings": list(plan.arm_cells[0].trial_settings),
        "n_trials": plan.arm_cells[0].n_trials,
        "arm_cells": [
            {
                "arm": arm_cell.arm,
                "cell": arm_cell.cell,
                "values": arm_cell.values,
                "matched": None if arm_cell.matched is None else asdict(arm_cell.matched),
                "code": arm_cell.code,
            }
            for arm_cell in plan.arm_cells
        ],
    }
    write_json(folder / FILE, kept)


def forget(folder: Path) -> None:
    """Have the next driver plan anew."""
    (folder / FILE).unlink(missing_ok=True)


def _plan(sweep: SweepConfig, kept: dict[str, Any]) -> Plan:
    factors, settings = cells_of(sweep), tuple(kept["settings"])
    arm_cells = []
    for given in kept["arm_cells"]:
        matched = None if given["matched"] is None else Matched(**given["matched"])
        place = (given["arm"], given["cell"], factors[given["cell"]])
        arm_cell = ArmCell(sweep, *place, given["values"], settings, kept["n_trials"], matched)
        vars(arm_cell)["code"] = given["code"]  # what the cached property would say
        arm_cells.append(arm_cell)
    return Plan(sweep, tuple(arm_cells))


def _installed() -> list[str]:
    """Names and versions of all packages on the path, as the names of their folders tell them."""
    folders = [Path(entry) for entry in sys.path if entry and Path(entry).is_dir()]
    return sorted(f"{folder}/{name}" for folder in folders for name in os.listdir(folder) if name.endswith("-info"))


def _gpus() -> list[str]:
    """What this machine and the user's environment say about GPUs, without torch."""
    version = Path("/proc/driver/nvidia/version")
    driver = version.read_text(encoding="utf-8", errors="replace") if version.exists() else ""
    devices = sorted(map(str, Path("/dev").glob("nvidia*")))
    return [driver, *devices, os.environ.get("CUDA_VISIBLE_DEVICES", "unset")]
