"""Root-mean-square normalisation with a scale that starts at one and decays towards one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight), over the last dimension.

    Shapes: (..., dim) -> (..., dim), in the dtype of ``x``. float16 and bfloat16 are computed in float32,
    float32 and float64 in their own precision.

    Source: Zhang and Sennrich, 2019, arXiv:1910.07467. Ours stores the scale minus one (``weight`` starts at
    zero), so that weight decay pulls the scale to one instead of zero.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return functional.rms_norm(x.to(wide), (self.dim,), 1 + self.weight.to(wide), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


def norms_of(x: Tensor, norms: Sequence[RMSNorm]) -> list[Tensor]:
    """What each of several norms of one width and eps makes of the same ``x`` (..., dim).

    On the CPU they share the division by the root mean square; on CUDA each norm is one kernel.
    """
    first = norms[0]
    if x.device.type != "cpu":
        return [norm(x) for norm in norms]
    wide = torch.promote_types(x.dtype, torch.float32)
    divided = functional.rms_norm(x.to(wide), (first.dim,), None, first.eps)
    return [(divided * (1 + norm.weight.to(wide))).to(x.dtype) for norm in norms]
