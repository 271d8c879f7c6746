"""A healthy mixer of two implementations, and faults of the fast one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tests.mixers.contract.faulty import caught_by
from tests.mixers.contract.healthy import DecayedSum, DecayedSumConfig


class TwinSumConfig(DecayedSumConfig):
    impl: Literal["powers", "reference"] = "powers"


class TwinSum(DecayedSum):
    """``powers``: all sums at once, s_t = a^(t+1) s_0 + sum_r a^(t-r) x_r over r <= t, as a product with a^(t-r)."""

    Config = TwinSumConfig

    @property
    def impl(self) -> str:
        return self.config.impl

    def scan(self, inputs: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        return super().scan(inputs, total) if self.impl == "reference" else self.fast_scan(inputs, total)

    def fast_scan(self, inputs: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        log_decay = torch.nn.functional.logsigmoid(self.decay.to(total.dtype))
        rows = torch.cat([total[:, None], inputs.to(total.dtype)], dim=1)
        steps = torch.arange(rows.shape[1], device=rows.device)
        distance = (steps[:, None] - steps).clamp(min=0)
        decayed = torch.exp(distance[..., None] * log_decay) * rows[:, None]
        # Not by a product with zeros, which would let a NaN of the future through.
        sums = torch.where((steps[:, None] >= steps)[..., None], decayed, 0).sum(dim=2)
        return sums[:, 1:], sums[:, -1].clone()


@caught_by("twin")
class FastPathIsCoarse(TwinSum):
    def fast_scan(self, inputs, total):
        sums, last = super().fast_scan(inputs, total)
        return sums.bfloat16().to(sums.dtype), last


@caught_by("twin")
class FastPathForgetsState(TwinSum):
    def fast_scan(self, inputs, total):
        return super().fast_scan(inputs, torch.zeros_like(total))


@caught_by("twin")
class FastPathLosesGradient(TwinSum):
    def fast_scan(self, inputs, total):
        sums, last = super().fast_scan(inputs.detach(), total)
        return sums, last


@caught_by("twin")
class FastPathStoresHalf(TwinSum):
    def fast_scan(self, inputs, total):
        sums, last = super().fast_scan(inputs, total)
        return sums, last.bfloat16().to(last.dtype)
