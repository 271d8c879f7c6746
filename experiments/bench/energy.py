"""Energy that a device says it has used: NVIDIA's counter for a GPU, RAPL for the CPU where it may be read."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import torch

NVML_LIBRARY = "libnvidia-ml.so.1"
RAPL = Path("/sys/class/powercap")
# Counters move every 20 to 100 ms: less than this can't be told from one step.
MIN_S = 0.5


class Energy:
    """Joules of ``device``, the whole board or packages, whoever uses them; ``why_not`` where that is unknown."""

    def __init__(self, device: torch.device, rapl: Path = RAPL) -> None:
        self.why_not = ""
        self._read: Callable[[], float] | None = None
        self.source = ""
        if device.type == "cuda":
            self._start_nvml(device)
        else:
            self._start_rapl(rapl)

    @property
    def is_known(self) -> bool:
        return self._read is not None

    def joules(self) -> float:
        assert self._read is not None
        return self._read()

    def _start_nvml(self, device: torch.device) -> None:
        try:
            library = ctypes.CDLL(NVML_LIBRARY)
        except OSError:
            self.why_not = f"{NVML_LIBRARY} of the driver is not here"
            return
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self._read = nvml_counter(library, uuid)
        self.source = "NVML, whole board"
        if self._read is None:
            self.why_not = "the driver tells no energy of this GPU"

    def _start_rapl(self, folder: Path) -> None:
        # Top-level zones are packages; intel-rapl:0:1 would be a part of the first.
        zones = sorted(zone for zone in folder.glob("intel-rapl:*") if zone.name.count(":") == 1)
        try:
            ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
            _microjoules(zones)
        except OSError as error:
            self.why_not = f"RAPL can't be read: {error.strerror}"
            return
        if not zones:
            self.why_not = "this system has no RAPL counters"
            return
        self._read = _rapl_reader(zones, ranges)
        self.source = "RAPL, whole packages"


def nvml_counter(library: ctypes.CDLL, uuid: str) -> Callable[[], float] | None:
    """Reads joules of the GPU with this UUID; None where NVML doesn't count them (before Volta, parts of a GPU)."""
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
        return None

    def read() -> float:
        millijoules = ctypes.c_ulonglong()
        status = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return float("nan") if status else millijoules.value / 1e3

    return None if math.isnan(read()) else read


def _microjoules(zones: list[Path]) -> list[int]:
    return [int((zone / "energy_uj").read_text()) for zone in zones]


def _rapl_reader(zones: list[Path], ranges: list[int]) -> Callable[[], float]:
    """Joules of all zones, across the counters' overflow as long as it is read once per round of theirs."""
    last, total = _microjoules(zones), 0

    def read() -> float:
        nonlocal last, total
        now = _microjoules(zones)
        total += sum((new - old) % (limit + 1) for new, old, limit in zip(now, last, ranges, strict=True))
        last = now
        return total / 1e6

    return read
