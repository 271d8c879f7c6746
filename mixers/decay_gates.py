"""Start values of learned forgetting, exp(-A step): rates A and time steps, as in Mamba-2."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

DECAY_RATE_RANGE = (1.0, 16.0)
TIME_STEP_RANGE = (1e-3, 1e-1)


@torch.no_grad()
def reset_decay_rates(A_log: Tensor) -> None:
    """exp(A_log) uniform in [1, 16]."""
    nn.init.uniform_(A_log, *DECAY_RATE_RANGE).log_()


@torch.no_grad()
def reset_time_steps(dt_bias: Tensor) -> None:
    """softplus(dt_bias) log-uniform in [0.001, 0.1]."""
    shortest, longest = (math.log(step) for step in TIME_STEP_RANGE)
    step = nn.init.uniform_(dt_bias, shortest, longest).exp()
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
