"""Queries, keys and values of the delta-rule layers: convolved, activated, keys of length one."""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mixers.config import MixerConfig
from mixers.short_conv import ShortConv

L2_EPS = 1e-6


class DeltaHeadsConfig(MixerConfig):
    """Options that the delta-rule layers share."""

    n_heads: int = Field(1, gt=0, description="H")
    key_dim: int | None = Field(None, gt=0, description="K, query and key width of a head; None: d_model / n_heads")
    value_dim: int | None = Field(None, gt=0, description="V, value width of a head; None: key_dim * expand_v")
    expand_v: float = Field(1.0, gt=0, description="V / K, where value_dim isn't given")
    conv_kernel: int = Field(4, ge=0, description="taps of the short convolutions on q, k, v; 0: none")
    norm_eps: float = Field(1e-5, gt=0)
    chunk_size: int = Field(32, gt=0, description="tokens solved as one triangular system; changes speed only")
    impl: Literal["auto", "reference", "fla"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.key_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} isn't divisible by n_heads={self.n_heads}; change one, or set key_dim"
            )
        if self.value_dim is not None and self.expand_v != 1.0:
            raise ValueError(f"value_dim={self.value_dim} and expand_v={self.expand_v} both set V; give one of them")
        if self.value_dim is None and not (self.head_key_dim * self.expand_v).is_integer():
            raise ValueError(
                f"expand_v={self.expand_v} times the key width {self.head_key_dim} isn't a whole number; set value_dim"
            )
        return self

    @property
    def head_key_dim(self) -> int:
        """K, resolved."""
        return self.d_model // self.n_heads if self.key_dim is None else self.key_dim

    @property
    def head_value_dim(self) -> int:
        """V, resolved."""
        return int(self.head_key_dim * self.expand_v) if self.value_dim is None else self.value_dim


class ConvState(NamedTuple):
    """The last conv_kernel-1 inputs of the three convolutions (B,k-1,H K) and (B,k-1,H V), None without them."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None


class DeltaHeads(nn.Module):
    """q, k = l2norm(silu(conv(W x))),  v = silu(conv(W_v x)), with causal depthwise convolutions.

    Shapes: x (B,T,D) -> q, k (B,T,H,K), v (B,T,H,V). The state holds the inputs that the convolutions still need.
    Padded inputs count as zeros.

    Source: the heads of DeltaNet, arXiv:2406.06484.
    """

    def __init__(self, config: DeltaHeadsConfig) -> None:
        super().__init__()
        self.key_dim, self.value_dim = config.head_key_dim, config.head_value_dim
        key_width, value_width = config.n_heads * self.key_dim, config.n_heads * self.value_dim
        self.q = nn.Linear(config.d_model, key_width, bias=False)
        self.k = nn.Linear(config.d_model, key_width, bias=False)
        self.v = nn.Linear(config.d_model, value_width, bias=False)
        self.conv_q = ShortConv(key_width, config.conv_kernel) if config.conv_kernel else None
        self.conv_k = ShortConv(key_width, config.conv_kernel) if config.conv_kernel else None
        self.conv_v = ShortConv(value_width, config.conv_kernel) if config.conv_kernel else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections normal with variance 1 / fan-in."""
        for linear in (self.q, self.k, self.v):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for conv in (self.conv_q, self.conv_k, self.conv_v):
            if conv is not None:
                conv.reset_parameters()

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> ConvState:
        """Zeros, or None without convolutions."""
        convs = (self.conv_q, self.conv_k, self.conv_v)
        return ConvState(
            *(None if conv is None else conv.initial_state(batch_size, device=device, dtype=dtype) for conv in convs)
        )

    def forward(
        self, x: Tensor, state: ConvState | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, ConvState]:
        """Return q, k, v and the new state."""
        past = ConvState(None, None, None) if state is None else state
        q, conv_q = convolved(self.conv_q, self.q(x), past.q, mask)
        k, conv_k = convolved(self.conv_k, self.k(x), past.k, mask)
        v, conv_v = convolved(self.conv_v, self.v(x), past.v, mask)
        q, k = (unit_length(part.unflatten(-1, (-1, self.key_dim))) for part in (q, k))
        return q, k, v.unflatten(-1, (-1, self.value_dim)), ConvState(conv_q, conv_k, conv_v)

    def flops_per_token(self) -> int:
        """Projections and convolutions."""
        projections = 2 * sum(linear.weight.numel() for linear in (self.q, self.k, self.v))
        convs = (self.conv_q, self.conv_k, self.conv_v)
        return projections + sum(conv.flops_per_token() for conv in convs if conv is not None)


def convolved(
    conv: ShortConv | None, x: Tensor, state: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """silu(conv(x)) and the convolution's state, or silu(x) and None without one."""
    return (functional.silu(x), None) if conv is None else conv(x, state, mask)


def unit_length(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + eps), in the dtype of x, computed in float32 for half dtypes."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)
