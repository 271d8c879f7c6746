"""Where a run computes, and in which precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from experiments.config import TrainConfig
from experiments.errors import UserError


@dataclass(frozen=True)
class Compute:
    """A device and the autocast dtype, None for float32 throughout."""

    device: torch.device
    autocast_dtype: torch.dtype | None

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(
            self.device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=self.autocast_dtype is not None
        ):
            yield

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def resolve_compute(config: TrainConfig) -> Compute:
    """``auto``: CUDA with bf16 where there is a GPU, else CPU with float32."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"train.device={config.device!r}: this machine has no usable CUDA device; use device='cpu'")
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "float32"
    return Compute(device, torch.bfloat16 if precision == "bf16" else None)
