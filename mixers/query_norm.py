"""How the queries of a product-key memory are normalised before they meet the sub-keys."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mixers.errors import UserError

QueryNorm = Literal["rms", "rms_float32", "batch", "none"]


def query_norm(kind: QueryNorm, width: int) -> nn.Module:
    """The module of one kind for queries (B,T,W); all but ``none`` have ``reset_parameters``.

    ``rms``: q / rms(q) over the width, in the input's precision. ``rms_float32``: the same rounded to float32 inside,
    which differs for wider inputs only. ``batch``: :class:`TokenBatchNorm`. ``none``: q as it is.
    """
    if kind == "rms":
        return nn.RMSNorm(width, eps=1e-6)
    if kind == "rms_float32":
        return Float32RMSNorm(width, eps=1e-6)
    if kind == "batch":
        return TokenBatchNorm(width)
    assert kind == "none", kind
    return nn.Identity()


class Float32RMSNorm(nn.RMSNorm):
    """x / rms(x) rounded to float32, then scaled in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        narrow = x.float()
        rms = torch.rsqrt(narrow.square().mean(-1, keepdim=True) + self.eps)
        return (narrow * rms).to(x.dtype) * self.weight


class TokenBatchNorm(nn.Module):
    """Batch normalisation of each channel over all real tokens of a call.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    Training takes mean and var from the call's own tokens (var with 1/n), and moves the running ones towards them:
    r <- r + momentum (statistic - r), var with 1/(n-1). Evaluation takes the running ones, so that each token is
    normalised alone. Shapes: x (B,T,W), mask (B,T) bool or None; running_mean, running_var (W,).

    Raises:
        UserError: training on a single token, which is its own mean: y would be ``bias`` whatever x is. Where a mask
            leaves a single one, y is ``bias`` there and the running statistics stay: asking would wait for the GPU.

    Source: Ioffe and Szegedy, arXiv:1502.03167. Ours leaves padding out of the statistics; float16 and bfloat16 are
    normalised in float32.
    """

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.register_buffer("running_mean", torch.empty(width))
        self.register_buffer("running_var", torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for ones in (self.weight, self.running_var):
            nn.init.ones_(ones)
        for zeros in (self.bias, self.running_mean):
            nn.init.zeros_(zeros)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var = self._statistics(wide, mask) if self.training else (self.running_mean, self.running_var)
        scale = self.weight.to(wide) * torch.rsqrt(var.to(wide) + self.eps)
        return ((wide - mean.to(wide)) * scale + self.bias.to(wide)).to(x.dtype)

    def _statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if x.shape[0] * x.shape[1] == 1:
            raise UserError(
                "query_norm='batch': training needs more than one token in a call, got 1; "
                "train on longer calls, call eval(), or use query_norm='rms'"
            )
        real = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
        n_real = real.sum()
        share = (real / n_real.clamp(min=1)).unsqueeze(-1)
        mean = (x * share).sum((0, 1))
        var = ((x - mean).square() * share).sum((0, 1))
        with torch.no_grad():
            unbiased = var * (n_real / (n_real - 1).clamp(min=1))
            for running, statistic in ((self.running_mean, mean), (self.running_var, unbiased)):
                moved = running.to(x).lerp(statistic, self.momentum)
                running.copy_(torch.where(n_real > 1, moved, running.to(x)))
        return mean, var
