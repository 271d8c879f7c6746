"""Start values of decays e^{-A dt} with learned rates A and time steps dt, as state-space models set them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

DECAY_RATE_RANGE = (1.0, 16.0)
TIME_STEP_RANGE = (1e-3, 1e-1)


@torch.no_grad()
def reset_decay(a_log: Tensor, dt_bias: Tensor) -> None:
    """Write ln A, A uniform in [1, 16], and dt_bias with softplus(dt_bias) log-uniform in [0.001, 0.1].

    Source: Dao and Gu, Mamba-2, arXiv:2405.21060.
    """
    nn.init.uniform_(a_log, *DECAY_RATE_RANGE).log_()
    shortest, longest = (math.log(step) for step in TIME_STEP_RANGE)
    step = nn.init.uniform_(dt_bias, shortest, longest).exp()
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step
