"""What this machine can run: asked of the machine, creating and changing nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from experiments.environment import versions
from experiments.errors import UserError
from experiments.paths import runs_root, tracking_uri

# Declared as a requirement on Linux, yet every mixer also runs without it.
DISPENSABLE = {"flash-linear-attention"}
# Width of the mixers that are built to ask which implementation they take.
PROBE_WIDTH = 64


def diagnose(runs: Path | None = None) -> dict[str, Any]:
    """Everything ``mixlab doctor`` reports, as JSON values.

    ``broken`` holds one line for each thing without which mixlab can't work here: a required package, a device that
    doesn't compute, the tracking store, a mixer that can't be built. ``missing`` is what would only make it faster.
    """
    runs = runs_root() if runs is None else runs
    packages, broken = required_packages()
    devices: list[dict[str, Any]] = []
    mixers: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    if packages.get("torch") is not None and packages.get("pydantic") is not None:
        devices = present_devices()
        usable = [device["name"] for device in devices if device["error"] is None]
        mixers = implementations(usable)
        missing = missing_cuda() + missing_kernels(any(name.startswith("cuda") for name in usable))
        missing += faulty_kernels([name for name in usable if name.startswith("cuda")])
    store = tracking_store(runs) if packages.get("mlflow") is not None else None
    broken += [f"device {device['name']}: {device['error']}" for device in devices if device["error"]]
    broken += [f"mixer {mixer['name']!r}: {mixer['error']}" for mixer in mixers if mixer["error"]]
    broken += [store["error"]] if store and store["error"] else []
    return {
        "machine": machine(runs),
        "versions": {**packages, **versions()},
        "devices": devices,
        "store": store,
        "mixers": mixers,
        "missing": missing,
        "broken": broken,
    }


def machine(runs: Path) -> dict[str, Any]:
    """Platform, cores that this process may use, and free bytes: of memory, and of the disk that takes the runs."""
    folder = next(folder for folder in (runs.resolve(), *runs.resolve().parents) if folder.is_dir())
    may_choose = hasattr(os, "sched_getaffinity")
    return {
        "platform": platform.platform(),
        "n_cores": len(os.sched_getaffinity(0)) if may_choose else os.cpu_count(),
        "free_memory_bytes": free_memory_bytes(),
        "free_disk_bytes": shutil.disk_usage(folder).free,
        "runs": str(runs.resolve()),
    }


def free_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that can be had without swapping, as Linux estimates it; None on other systems."""
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text().splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024
    return None


def required_packages() -> tuple[dict[str, str | None], list[str]]:
    """Installed version of every required package (None: absent), and a line for each that doesn't fit."""
    from packaging.requirements import Requirement

    found: dict[str, str | None] = {}
    broken = []
    try:
        declared = importlib.metadata.requires("mixlab") or []
    except importlib.metadata.PackageNotFoundError:
        return {"mixlab": None}, ["package mixlab: not installed; in its source folder: pip install -e ."]
    for requirement in map(Requirement, declared):
        name = requirement.name
        if name in DISPENSABLE or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        install = f"pip install '{name}{requirement.specifier}'"
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
            broken.append(f"package {name}: not installed; {install}")
            continue
        if not requirement.specifier.contains(found[name], prereleases=True):
            broken.append(f"package {name}: {found[name]} is installed, needed is {requirement.specifier}; {install}")
    return found, broken


def present_devices() -> list[dict[str, Any]]:
    """The CPU and every CUDA device: name, memory, and ``error``, None where a small product comes out right."""
    import torch

    devices: list[dict[str, Any]] = [{"name": "cpu", "error": device_error("cpu")}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = f"cuda:{index}"
        error = device_error(name)
        device = {"name": name, "gpu": torch.cuda.get_device_name(index), "error": error}
        if error is None:
            free, total = torch.cuda.mem_get_info(index)
            device |= {"free_memory_bytes": free, "memory_bytes": total}
        devices.append(device)
    return devices


def device_error(device: str) -> str | None:
    """None when a small product of matrices comes out right there, else why not."""
    import torch

    try:
        ones = torch.ones(8, 8, device=device)
        total = (ones @ ones).sum().item()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None if total == 512.0 else f"a product of matrices sums to {total} instead of 512"


def implementations(devices: list[str]) -> list[dict[str, Any]]:
    """What each registered mixer runs with default options, by device; ``error`` where it can't be built."""
    from mixers import registry

    rows: list[dict[str, Any]] = []
    for name in registry.names():
        row: dict[str, Any] = {"name": name, "impl": {}, "error": None}
        try:
            mixer = registry.build(name, {"d_model": PROBE_WIDTH})
            for device in devices:
                supported = device.partition(":")[0] in mixer.traits.devices
                row["impl"][device] = mixer.to(device).impl if supported else None
        except Exception as error:  # noqa: BLE001  a stranger's mixer may raise anything, and that is the finding
            row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
    rows += [{"name": name, "impl": {}, "error": why} for name, why in registry.problems().items()]
    return rows


def missing_cuda() -> list[dict[str, Any]]:
    """An entry when there is an NVIDIA driver, and a torch that was built without CUDA."""
    import torch

    if torch.version.cuda is not None or shutil.which("nvidia-smi") is None:
        return []
    # The build on PyPI is the one with CUDA on Linux; the local part of the version (+cpu) names the other.
    version = torch.__version__.partition("+")[0]
    command = f"pip install --force-reinstall --index-url https://pypi.org/simple torch=={version}"
    return [
        {"packages": ["CUDA in torch"], "serves": "every mixer on the GPU", "command": command, "useful_here": True}
    ]


def missing_kernels(has_gpu: bool) -> list[dict[str, Any]]:
    """Optional kernel packages that aren't here: what they serve, how to get them, and whether this machine would
    gain."""
    from mixers.implementations import (
        FLA_INSTALL,
        FLA_MISSING,
        FLASH_ATTN_INSTALL,
        FLASH_ATTN_MISSING,
        TRITON_INSTALL,
        TRITON_MISSING,
    )

    kinds = [
        (FLA_MISSING, "impl='fla' of linear attention and delta rules", FLA_INSTALL),
        (FLASH_ATTN_MISSING, "impl='flash_attn' of softmax", FLASH_ATTN_INSTALL),
        (TRITON_MISSING, "impl='triton' of fwpkm", TRITON_INSTALL),
    ]
    return [
        {"packages": list(packages), "serves": serves, "command": command, "useful_here": has_gpu}
        for packages, serves, command in kinds
        if packages
    ]


def faulty_kernels(devices: list[str]) -> list[dict[str, Any]]:
    """An entry when a device here makes the installed triton give wrong gradients, which fla refuses."""
    import torch

    from mixers.implementations import TRITON_MENDED, gated_backward_fault

    faults = [gated_backward_fault(torch.device(device), mended_by_tilelang=False) for device in devices]
    if not any(faults):
        return []
    serves = "impl='fla' of mamba2 and gated_deltanet, training of some fla: layers"
    return [{"packages": ["triton 3.7.1 or newer"], "serves": serves, "command": TRITON_MENDED, "useful_here": True}]


def tracking_store(runs: Path) -> dict[str, Any]:
    """The tracking store that a run would use, and whether it can."""
    from experiments.tracking.client import shown
    from experiments.tracking.store import probe_store

    uri = tracking_uri(runs)
    try:
        return {"uri": shown(uri), "status": probe_store(uri), "error": None}
    except UserError as error:
        return {"uri": shown(uri), "status": None, "error": str(error)}
