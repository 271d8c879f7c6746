"""Kimi Delta Attention: the gated delta rule with a decay of its own for every key channel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mixers.base import Mixer, MixerOutput, ParameterOptions, Traits
from mixers.decay_gates import reset_decay_rates, reset_time_steps
from mixers.delta_heads import ConvState, DeltaHeads, DeltaHeadsConfig
from mixers.delta_rule import unsupported_by_fla
from mixers.dplr import DPLROutput, dplr_chunked, dplr_recurrent
from mixers.implementations import require_fla, resolve_fla
from mixers.masking import zero_padding
from mixers.norms import RMSNorm
from mixers.registry import register


class KDAState(NamedTuple):
    """conv, what the short convolutions need; memory (B,H,K,V), at least float32."""

    conv: ConvState
    memory: Tensor


class KDAConfig(DeltaHeadsConfig):
    """Options of Kimi Delta Attention."""

    gate_rank: int | None = Field(
        None, gt=0, description="inner width of the decay's and the output gate's projections; None: V"
    )
    negative_eigenvalues: bool = Field(False, description="write strengths in [0,2] instead of [0,1]")

    @property
    def rank(self) -> int:
        """Inner width of the two gates, resolved."""
        return self.head_value_dim if self.gate_rank is None else self.gate_rank


@register("kda")
class KDA(Mixer):
    """S_t = (I - b_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + b_t k_t v_t^T,
    y_t = W_o [norm(S_t^T q_t) * sigmoid(W_2 W_1 x_t + c)].

    g_t = -exp(A_log) softplus(F_2 F_1 x_t + dt_bias), one for each key channel, with A_log one for a head;
    b_t = sigmoid(W_b x_t), one for a head, twice that with ``negative_eigenvalues`` (arXiv:2411.12537).
    q, k = l2norm(silu(conv(W x))), v = silu(conv(W_v x)), with causal depthwise convolutions; norm is RMSNorm over
    each head, its scale shared by the heads. F_1 and W_1 narrow x to ``gate_rank``.

    Shapes: x (B,T,D); q, k, g (B,T,H,K); v and the gate (B,T,H,V). The state is S (B,H,K,V), in float32 or float64,
    and the inputs that the convolutions still need.

    Padding: padded tokens write nothing, forget nothing, count as zeros in the convolutions, and their y is zero.

    ``impl``: ``reference`` solves chunks of tokens as triangular systems, and a single token by the rule itself;
    ``fla`` calls flash-linear-attention's Triton kernels on CUDA. ``auto`` takes fla on CUDA where it is installed
    and K is at most 256, except in float64.

    Raises:
        UserError: ``fla`` is asked for and can't run here; a mask of the wrong shape or dtype.

    Source: Kimi Team, Kimi Linear, arXiv:2510.26692. Ours leaves out the factor 1/sqrt(K) on q that the norm
    undoes, lets every width be chosen freely, has one value head for each key head, and starts all
    projections normal with variance 1 / fan-in. A in [1, 16] and the time steps start as in flash-linear-attention.
    """

    Config = KDAConfig
    traits = Traits(state_growth="constant")
    family = "delta rule"
    source = "arXiv:2510.26692"
    config: KDAConfig

    def __init__(self, config: KDAConfig) -> None:
        super().__init__(config)
        if config.impl == "fla":
            require_fla("mixer 'kda'")
        key_width = config.n_heads * config.head_key_dim
        value_width = config.n_heads * config.head_value_dim
        self.heads = DeltaHeads(config)
        self.beta = nn.Linear(config.d_model, config.n_heads, bias=False)
        self.decay_in = nn.Linear(config.d_model, config.rank, bias=False)
        self.decay_out = nn.Linear(config.rank, key_width, bias=False)
        self.A_log = nn.Parameter(torch.empty(config.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(key_width))
        self.gate_in = nn.Linear(config.d_model, config.rank, bias=False)
        self.gate_out = nn.Linear(config.rank, value_width)
        self.norm = RMSNorm(config.head_value_dim, eps=config.norm_eps)
        self.out = nn.Linear(value_width, config.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.heads.reset_parameters()
        self.norm.reset_parameters()
        for linear in self._linears():
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(self.gate_out.bias)
        reset_decay_rates(self.A_log)
        reset_time_steps(self.dt_bias)

    def _linears(self) -> list[nn.Linear]:
        return [module for module in self.children() if isinstance(module, nn.Linear)]

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """Decay rates and time steps have their own scale: weight decay would drag them to another one."""
        return {name: ParameterOptions(weight_decay=False) for name in ("A_log", "dt_bias")}

    @property
    def impl(self) -> str:
        weight = self.out.weight
        unsupported = unsupported_by_fla(weight.dtype, self.config.head_key_dim)
        return resolve_fla(self.config.impl, weight.device, "mixer 'kda'", unsupported)

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> KDAState:
        config = self.config
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch_size, config.n_heads, config.head_key_dim, config.head_value_dim)
        conv = self.heads.initial_state(batch_size, device=device, dtype=dtype)
        return KDAState(conv, torch.zeros(shape, device=device, dtype=wide))

    def forward(
        self, x: Tensor, state: KDAState | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        config, impl = self.config, self.impl
        conv, memory = (None, None) if state is None else state
        x = zero_padding(x, mask)
        q, k, v, conv = self.heads(x, conv, mask)
        beta, log_decay = self._gates(x)
        if impl == "fla" and x.shape[1] > 0:
            core = _fla(q, k, v, zero_padding(beta, mask), zero_padding(log_decay, mask), memory)
        else:
            core = kda_reference(q, k, v, beta, log_decay, memory, mask, chunk_size=config.chunk_size)
        heads = self.norm(core.y.to(v.dtype))
        heads = heads * self.gate_out(self.gate_in(x)).sigmoid().view_as(heads)
        y = zero_padding(self.out(heads.flatten(2)), mask)
        return MixerOutput(y, KDAState(conv, core.state) if return_state else None, {})

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Write strengths (B,T,H) and log decays (B,T,H,K), at least float32: rounded logs would add up over the
        tokens."""
        config, wide = self.config, torch.promote_types(x.dtype, torch.float32)
        beta = self.beta(x).to(wide).sigmoid()
        step = functional.softplus(self.decay_out(self.decay_in(x)).to(wide) + self.dt_bias.to(wide))
        rate = self.A_log.to(wide).exp().unsqueeze(-1)
        return 2 * beta if config.negative_eigenvalues else beta, -rate * step.unflatten(-1, (config.n_heads, -1))

    def flops_per_token(self, context: int) -> float:
        """Projections, convolutions, and three products of K x V for each head: what the key holds, the write, the
        read. Free of the context."""
        config = self.config
        projections = 2 * sum(linear.weight.numel() for linear in self._linears())
        rule = 6 * config.n_heads * config.head_key_dim * config.head_value_dim
        return float(self.heads.flops_per_token() + projections + rule)


def kda_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    chunk_size: int = 32,
) -> DPLROutput:
    """The rule as diagonal plus low rank: a = -exp(g) k reads what the decayed state holds, b = beta k overwrites it.

    Shapes: q, k and log_decay <= 0 (B,T,H,K), v (B,T,H,V), beta (B,T,H), state (B,H,K,V) -> y (B,T,H,V) and the
    state. A single token goes by the recurrence, several by chunks.
    """
    key = k.to(torch.promote_types(q.dtype, torch.float32))
    inputs = (q, -log_decay.exp() * key, beta.unsqueeze(-1) * key, v, log_decay, state, mask)
    if q.shape[1] == 1:
        return dplr_recurrent(*inputs)
    return dplr_chunked(*inputs, chunk_size=chunk_size)


def _fla(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor | None) -> DPLROutput:
    """The same on CUDA; the kernels keep the state in float32."""
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    # The recurrent kernel has no backward: it serves decoding only.
    decoding = q.shape[1] == 1 and not torch.is_grad_enabled()
    kernel = fused_recurrent_kda if decoding else chunk_kda
    y, new_state = kernel(
        q=q,
        k=k,
        v=v,
        g=log_decay,
        beta=beta.to(v.dtype),
        scale=1.0,
        initial_state=state,
        output_final_state=True,
    )
    return DPLROutput(y, new_state)
