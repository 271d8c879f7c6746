"""Gated DeltaNet: a fast-weight matrix that overwrites what a key held before, and forgets by a learned gate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mixers.base import Mixer, MixerOutput, ParameterOptions, Traits
from mixers.decay_gates import reset_decay_rates, reset_time_steps
from mixers.delta_heads import DeltaHeadsConfig, convolved, unit_length
from mixers.delta_rule import gated_delta_rule, unsupported_by_fla
from mixers.implementations import gated_backward_fault, require_fla, resolve_fla
from mixers.masking import zero_padding
from mixers.norms import RMSNorm
from mixers.registry import register
from mixers.short_conv import ShortConv


class GatedDeltaNetState(NamedTuple):
    """The last conv_kernel-1 inputs of the three convolutions (B,k-1,H K) and (B,k-1,H V), None without them;
    memory (B,H,K,V), at least float32."""

    conv_q: Tensor | None
    conv_k: Tensor | None
    conv_v: Tensor | None
    memory: Tensor


class GatedDeltaNetConfig(DeltaHeadsConfig):
    """Options of gated DeltaNet."""

    use_output_gate: bool = True


@register("gated_deltanet")
class GatedDeltaNet(Mixer):
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,  y_t = W_o [norm(S_t^T q_t) * silu(W_g x_t)].

    a_t = exp(-exp(A_log) softplus(W_a x_t + dt_bias)) and b_t = sigmoid(W_b x_t), one each for a head.
    q, k = l2norm(silu(conv(W x))), v = silu(conv(W_v x)), with causal depthwise convolutions; norm is RMSNorm over
    each head, its scale shared by the heads.

    Shapes: x (B,T,D); q, k (B,T,H,K); v and the gate (B,T,H,V). The state is S (B,H,K,V), in float32 or float64,
    and the inputs that the convolutions still need.

    Padding: padded tokens write nothing, forget nothing, count as zeros in the convolutions, and their y is zero.

    ``impl``: ``reference`` solves chunks of tokens as triangular systems, and a single token by the rule itself;
    ``fla`` calls flash-linear-attention's Triton kernels on CUDA. ``auto`` takes fla on CUDA where it is installed
    and K is at most 256, except in float64.

    Raises:
        UserError: ``fla`` is asked for and can't run here; a mask of the wrong shape or dtype.

    Source: Yang, Kautz, Hatamizadeh, arXiv:2412.06464 (the paper writes S transposed). Ours leaves out the factor
    1/sqrt(K) on q that the norm undoes, lets every width be chosen freely, starts A in [1, 16] and all projections
    normal with variance 1 / fan-in.
    """

    Config = GatedDeltaNetConfig
    traits = Traits(state_growth="constant")
    family = "delta rule"
    source = "arXiv:2412.06464"
    config: GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__(config)
        if config.impl == "fla":
            require_fla("mixer 'gated_deltanet'")
        key_width = config.n_heads * config.head_key_dim
        value_width = config.n_heads * config.head_value_dim
        self.q = nn.Linear(config.d_model, key_width, bias=False)
        self.k = nn.Linear(config.d_model, key_width, bias=False)
        self.v = nn.Linear(config.d_model, value_width, bias=False)
        self.conv_q = ShortConv(key_width, config.conv_kernel) if config.conv_kernel else None
        self.conv_k = ShortConv(key_width, config.conv_kernel) if config.conv_kernel else None
        self.conv_v = ShortConv(value_width, config.conv_kernel) if config.conv_kernel else None
        self.beta = nn.Linear(config.d_model, config.n_heads, bias=False)
        self.decay = nn.Linear(config.d_model, config.n_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(config.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.n_heads))
        self.gate = nn.Linear(config.d_model, value_width, bias=False) if config.use_output_gate else None
        self.norm = RMSNorm(config.head_value_dim, eps=config.norm_eps)
        self.out = nn.Linear(value_width, config.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            else:
                module.reset_parameters()
        reset_decay_rates(self.A_log)
        reset_time_steps(self.dt_bias)

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """Decay rates and time steps have their own scale: weight decay would drag them to another one."""
        return {name: ParameterOptions(weight_decay=False) for name in ("A_log", "dt_bias")}

    @property
    def impl(self) -> str:
        weight = self.q.weight
        unsupported = unsupported_by_fla(weight.dtype, self.config.head_key_dim) or gated_backward_fault(weight.device)
        return resolve_fla(self.config.impl, weight.device, "mixer 'gated_deltanet'", unsupported)

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> GatedDeltaNetState:
        config = self.config
        convs = (
            None if conv is None else conv.initial_state(batch_size, device=device, dtype=dtype)
            for conv in (self.conv_q, self.conv_k, self.conv_v)
        )
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch_size, config.n_heads, config.head_key_dim, config.head_value_dim)
        return GatedDeltaNetState(*convs, torch.zeros(shape, device=device, dtype=wide))

    def forward(
        self,
        x: Tensor,
        state: GatedDeltaNetState | None = None,
        *,
        return_state: bool = False,
        mask: Tensor | None = None,
    ) -> MixerOutput:
        config, impl = self.config, self.impl
        x = zero_padding(x, mask)
        past = GatedDeltaNetState(None, None, None, None) if state is None else state
        q, conv_q = convolved(self.conv_q, self.q(x), past.conv_q, mask)
        k, conv_k = convolved(self.conv_k, self.k(x), past.conv_k, mask)
        v, conv_v = convolved(self.conv_v, self.v(x), past.conv_v, mask)
        q, k = (unit_length(part.unflatten(-1, (-1, config.head_key_dim))) for part in (q, k))
        v = v.unflatten(-1, (-1, config.head_value_dim))
        beta, log_decay = self._gates(x)

        core = gated_delta_rule(q, k, v, beta, log_decay, past.memory, mask, chunk_size=config.chunk_size, impl=impl)
        heads = self.norm(core.y.to(v.dtype))
        if self.gate is not None:
            heads = heads * functional.silu(self.gate(x).view_as(heads))
        y = zero_padding(self.out(heads.flatten(2)), mask)
        new_state = GatedDeltaNetState(conv_q, conv_k, conv_v, core.state) if return_state else None
        return MixerOutput(y, new_state, {})

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Write strengths and log decays (B,T,H), at least float32: rounded logs would add up over the tokens."""
        wide = torch.promote_types(x.dtype, torch.float32)
        rate = self.A_log.to(wide).exp()
        step = functional.softplus(self.decay(x).to(wide) + self.dt_bias.to(wide))
        return self.beta(x).to(wide).sigmoid(), -rate * step

    def flops_per_token(self, context: int) -> float:
        """Projections, convolutions, and three products of K x V for each head: what the key holds, the write, the
        read. Free of the context."""
        config = self.config
        linears = [module for module in self.children() if isinstance(module, nn.Linear)]
        projections = 2 * sum(linear.weight.numel() for linear in linears)
        convs = sum(conv.flops_per_token() for conv in (self.conv_q, self.conv_k, self.conv_v) if conv is not None)
        return float(projections + convs + 6 * config.n_heads * config.head_key_dim * config.head_value_dim)
