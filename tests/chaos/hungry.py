"""A mixer that takes memory in the worker until the system refuses it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch

from mixers.base import MixerOutput
from mixers.registry import register
from mixers.softmax import SoftmaxAttention

ROOM_BYTES, PIECE_BYTES = 256 << 20, 32 << 20


@register("chaos_hungry")
class Hungry(SoftmaxAttention):
    """Softmax attention that is never reached: there is no memory for it."""

    def forward(self, *args: Any, **options: Any) -> MixerOutput:
        if "sweeps.worker" in sys.orig_argv:
            take_all()
        return super().forward(*args, **options)


def take_all() -> None:
    """Allocate up to a limit of the system, as if the machine had no more."""
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, before[1]))
    taken = []
    try:
        while True:
            taken.append(torch.zeros(PIECE_BYTES, dtype=torch.uint8))
    finally:
        taken.clear()
        resource.setrlimit(resource.RLIMIT_AS, before)
