"""A small mixer that keeps the contract, in pieces that a fault can replace one at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mixers.base import Mixer, MixerOutput, Traits
from mixers.config import MixerConfig
from mixers.masking import zero_padding
from mixers.short_conv import ShortConv

DELAY_TOKENS = 2


class DecayedSumState(NamedTuple):
    """conv (B,k-1,D), the sum (B,D), and the last inputs (B,DELAY_TOKENS,D)."""

    conv: Tensor
    total: Tensor
    queue: Tensor


class DecayedSumConfig(MixerConfig):
    conv_kernel: int = Field(3, gt=0)


class DecayedSum(Mixer):
    """s_t = a s_{t-1} + conv(x)_t,  y_t = W_o (s_t * sigmoid(W_g x_t)) + w_d * x_{t-2}, a = sigmoid(decay)."""

    Config = DecayedSumConfig
    traits = Traits(state_growth="constant")
    family, source = "recurrence", "here"

    def __init__(self, config: DecayedSumConfig) -> None:
        super().__init__(config)
        self.conv = ShortConv(config.d_model, config.conv_kernel)
        self.gate = nn.Linear(config.d_model, config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.decay = nn.Parameter(torch.empty(config.d_model))
        self.delayed = nn.Parameter(torch.empty(config.d_model))
        self.register_buffer("scale", torch.empty(config.d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.conv.reset_parameters()
        for linear in (self.gate, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.uniform_(self.decay, 0.0, 2.0)
        nn.init.normal_(self.delayed)
        nn.init.uniform_(self.scale, 0.5, 1.5)

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> DecayedSumState:
        d_model = self.config.d_model
        return DecayedSumState(
            self.conv.initial_state(batch_size, device=device, dtype=dtype),
            torch.zeros(batch_size, d_model, device=device, dtype=torch.promote_types(dtype, torch.float32)),
            torch.zeros(batch_size, DELAY_TOKENS, d_model, device=device, dtype=dtype),
        )

    def forward(
        self,
        x: Tensor,
        state: DecayedSumState | None = None,
        *,
        return_state: bool = False,
        mask: Tensor | None = None,
    ) -> MixerOutput:
        x = zero_padding(x, mask)
        if state is None:
            state = self.initial_state(x.shape[0], device=x.device, dtype=x.dtype)
        inputs, conv = self.convolve(x, state.conv, mask)
        sums, total = self.scan(zero_padding(inputs, mask), state.total)
        history = torch.cat([state.queue.to(x.dtype), x], dim=1)
        y = self.out(sums.to(x.dtype) * torch.sigmoid(self.gate(x)) * self.scale)
        y = zero_padding(y + self.delayed * history[:, : x.shape[1]], mask).to(x.dtype)
        new_state = DecayedSumState(conv, total, history[:, x.shape[1] :].clone())
        return MixerOutput(y, new_state if return_state else None, {})

    def convolve(self, x: Tensor, past: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.conv(x, past, mask)

    def scan(self, inputs: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Sums after every token (B,T,D), and the last."""
        decay = torch.sigmoid(self.decay.to(total.dtype))
        sums = [total]
        for row in inputs.to(total.dtype).unbind(1):
            sums.append(decay * sums[-1] + row)
        return torch.stack(sums, dim=1)[:, 1:], sums[-1]

    def flops_per_token(self, context: int) -> float:
        return float(4 * self.config.d_model**2 + self.conv.flops_per_token())
