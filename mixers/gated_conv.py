"""Gated short convolution: exact, cheap mixing of the last few tokens, to stand beside layers with a long memory."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mixers.base import Mixer, MixerOutput, Traits
from mixers.config import MixerConfig
from mixers.masking import zero_padding
from mixers.registry import register
from mixers.short_conv import ShortConv


class GatedConvConfig(MixerConfig):
    """Options of the gated short convolution."""

    kernel: int = Field(3, gt=1, description="taps: the tokens that an output sees, its own included")
    inner_dim: int | None = Field(None, gt=0, description="E, width inside the layer; None: d_model")

    @property
    def width(self) -> int:
        """E, resolved."""
        return self.d_model if self.inner_dim is None else self.inner_dim


@register("short_conv")
class GatedConv(Mixer):
    """y_t = W_o (c_t * sum_{j<k} w_j * (b_{t-j} * u_{t-j})),  b, c, u = W_b x, W_c x, W_u x.

    Shapes: x (B,T,D); b, c, u (B,T,E); w (E,k), a filter of k taps for each channel. The state is the last k-1
    products b * u (B,k-1,E), zeros at the start, in the dtype of x.

    Padding: padded tokens count as zeros in the convolution and their y is zero. They keep their place: the taps
    do not jump over them.

    Raises:
        UserError: a mask of the wrong shape or dtype.

    Source: the short convolutions of LFM2 (arXiv:2511.23404), after the gates of H3 (arXiv:2212.14052) and Hyena
    (arXiv:2302.10866); Based (arXiv:2402.18668) sets such layers between its attention layers, with one gate. Ours
    has no biases and no activation; projections start normal with variance 1 / fan-in, taps uniform in
    +-1/sqrt(k).
    """

    Config = GatedConvConfig
    traits = Traits(state_growth="constant")
    family = "convolution"
    source = "arXiv:2511.23404"
    config: GatedConvConfig

    def __init__(self, config: GatedConvConfig) -> None:
        super().__init__(config)
        self.b = nn.Linear(config.d_model, config.width, bias=False)
        self.c = nn.Linear(config.d_model, config.width, bias=False)
        self.u = nn.Linear(config.d_model, config.width, bias=False)
        self.conv = ShortConv(config.width, config.kernel, activation=False)
        self.out = nn.Linear(config.width, config.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.b, self.c, self.u, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.conv.reset_parameters()

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        return self.conv.initial_state(batch_size, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        x = zero_padding(x, mask)
        mixed, new_state = self.conv(self.b(x) * self.u(x), state)
        y = self.out(self.c(x) * mixed)  # zero at padding, as c is
        return MixerOutput(y, new_state if return_state else None, {})

    def flops_per_token(self, context: int) -> float:
        """Projections and the convolution. Free of the context."""
        projections = 2 * sum(linear.weight.numel() for linear in (self.b, self.c, self.u, self.out))
        return float(projections + self.conv.flops_per_token())
