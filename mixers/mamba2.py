"""Mamba-2: a selective state-space layer, whose heads forget and take in by a time step that the token sets."""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mixers.base import Mixer, MixerOutput, ParameterOptions, Traits
from mixers.config import MixerConfig
from mixers.decay_attention import decay_attention, why_not_fla
from mixers.decay_gates import reset_decay_rates, reset_time_steps
from mixers.implementations import gated_backward_fault, require_fla, resolve_fla
from mixers.masking import zero_padding
from mixers.norms import RMSNorm
from mixers.registry import register
from mixers.short_conv import ShortConv


class Mamba2State(NamedTuple):
    """The last conv_kernel-1 inputs of the convolution (B,k-1,H V + 2 G K), None without it; memory (B,H,K,V), at
    least float32."""

    conv: Tensor | None
    memory: Tensor


class Mamba2Config(MixerConfig):
    """Options of Mamba-2."""

    n_heads: int = Field(1, gt=0, description="H")
    n_groups: int = Field(1, gt=0, description="G, heads that share their keys and queries; divides n_heads")
    key_dim: int = Field(64, gt=0, description="K, the paper's state size N: width of the keys B and queries C")
    expand: float = Field(2.0, gt=0, description="inner width H V / d_model")
    conv_kernel: int = Field(4, ge=0, description="taps of the short convolution on values, keys, queries; 0: none")
    norm_eps: float = Field(1e-5, gt=0)
    chunk_size: int = Field(32, gt=0, description="tokens handled as one masked product; changes speed only")
    impl: Literal["auto", "reference", "fla"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.n_heads % self.n_groups:
            raise ValueError(f"n_groups={self.n_groups} must divide n_heads={self.n_heads}")
        if not (self.expand * self.d_model / self.n_heads).is_integer():
            raise ValueError(
                f"expand={self.expand} times d_model={self.d_model} isn't divisible by n_heads={self.n_heads}"
            )
        return self

    @property
    def head_value_dim(self) -> int:
        """V, resolved: the paper's head dimension P."""
        return int(self.expand * self.d_model / self.n_heads)


@register("mamba2")
class Mamba2(Mixer):
    """S_t = a_t S_{t-1} + dt_t k_t v_t^T,  y_t = W_o norm[(S_t^T q_t + D v_t) * silu(W_z x_t)].

    dt_t = softplus(W_dt x_t + dt_bias) and a_t = exp(-exp(A_log) dt_t), one each for a head; v, k, q (the paper's
    x, B, C) = silu(conv(W x)), with one causal depthwise convolution over all of them; k and q are shared by the
    H / G heads of a group; D is a scalar for each head; norm is RMSNorm over all heads together.

    Shapes: x (B,T,D); v and the gate (B,T,H,V); q, k (B,T,G,K). The state is S (B,H,K,V), in float32 or float64, and
    the inputs that the convolution still needs.

    Padding: padded tokens write nothing, forget nothing, count as zeros in the convolution, and their y is zero.

    ``impl``: ``reference`` computes chunks of tokens as masked products and hands the state from chunk to chunk;
    ``fla`` calls flash-linear-attention's Triton kernels on CUDA. ``auto`` takes fla on CUDA where it is installed,
    except in float64 and for odd K or V.

    Raises:
        UserError: ``fla`` is asked for and can't run here; a mask of the wrong shape or dtype.

    Source: Dao and Gu, arXiv:2405.21060 (the paper writes S transposed). Ours has no bias in the convolution and
    starts all projections normal with variance 1 / fan-in; H is set instead of V. Its norm spans
    all heads, where flash-linear-attention's layer normalises each of the G groups by itself: with n_groups=1 that
    is the same. K is 64 unless told otherwise, there 128.
    """

    Config = Mamba2Config
    traits = Traits(state_growth="constant")
    family = "state space"
    source = "arXiv:2405.21060"
    config: Mamba2Config

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        if config.impl == "fla":
            require_fla("mixer 'mamba2'")
        value_width = config.n_heads * config.head_value_dim
        key_width = config.n_groups * config.key_dim
        self.widths = (value_width, key_width, key_width)
        self.vkq = nn.Linear(config.d_model, sum(self.widths), bias=False)
        self.conv = ShortConv(sum(self.widths), config.conv_kernel) if config.conv_kernel else None
        self.step = nn.Linear(config.d_model, config.n_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(config.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.n_heads))
        self.D = nn.Parameter(torch.empty(config.n_heads))
        self.gate = nn.Linear(config.d_model, value_width, bias=False)
        self.norm = RMSNorm(value_width, eps=config.norm_eps)
        self.out = nn.Linear(value_width, config.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.vkq, self.step, self.gate, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        if self.conv is not None:
            self.conv.reset_parameters()
        reset_decay_rates(self.A_log)
        reset_time_steps(self.dt_bias)
        nn.init.ones_(self.D)
        self.norm.reset_parameters()

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """Decay rates, time steps and skips have their own scale: weight decay would drag them to another one."""
        return {name: ParameterOptions(weight_decay=False) for name in ("A_log", "dt_bias", "D")}

    @property
    def impl(self) -> str:
        weight = self.vkq.weight
        unsupported = why_not_fla(weight.dtype, self.config.key_dim, self.config.head_value_dim)
        unsupported = unsupported or gated_backward_fault(weight.device, mended_by_tilelang=False)
        return resolve_fla(self.config.impl, weight.device, "mixer 'mamba2'", unsupported)

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> Mamba2State:
        config = self.config
        conv = None if self.conv is None else self.conv.initial_state(batch_size, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch_size, config.n_heads, config.key_dim, config.head_value_dim)
        return Mamba2State(conv, torch.zeros(shape, device=device, dtype=wide))

    def forward(
        self, x: Tensor, state: Mamba2State | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        config = self.config
        x = zero_padding(x, mask)  # no projection has a bias: the gate of a padded token, and so its y, is zero
        past = Mamba2State(None, None) if state is None else state
        if self.conv is None:
            mixed, conv = functional.silu(self.vkq(x)), None
        else:
            mixed, conv = self.conv(self.vkq(x), past.conv)
        v, k, q = mixed.split(self.widths, dim=-1)
        v = v.unflatten(-1, (config.n_heads, -1))
        k, q = (part.unflatten(-1, (config.n_groups, -1)) for part in (k, q))
        k, q = (part.repeat_interleave(config.n_heads // config.n_groups, dim=2) for part in (k, q))
        step, log_decay = self._steps(x)

        inputs = (step.unsqueeze(-1) * v).to(v.dtype)
        core = decay_attention(q, k, inputs, log_decay, past.memory, mask, impl=self.impl, chunk_size=config.chunk_size)
        heads = core.y.to(v.dtype) + self.D.to(v.dtype).unsqueeze(-1) * v
        y = self.out(self.norm(heads.flatten(2) * functional.silu(self.gate(x))))
        return MixerOutput(y, Mamba2State(conv, core.state) if return_state else None, {})

    def _steps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Time steps and log decays (B,T,H), at least float32: rounded logs would add up over the tokens."""
        wide = torch.promote_types(x.dtype, torch.float32)
        step = functional.softplus(self.step(x).to(wide) + self.dt_bias.to(wide))
        return step, -self.A_log.to(wide).exp() * step

    def flops_per_token(self, context: int) -> float:
        """Projections, the convolution, and two products of K x V for each head: the write and the read. Free of the
        context."""
        config = self.config
        projections = 2 * sum(linear.weight.numel() for linear in (self.vkq, self.step, self.gate, self.out))
        conv = 0 if self.conv is None else self.conv.flops_per_token()
        return float(projections + conv + 4 * config.n_heads * config.key_dim * config.head_value_dim)
