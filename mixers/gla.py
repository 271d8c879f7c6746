"""Gated linear attention: every key channel forgets at a rate that the token sets."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mixers.base import Mixer, MixerOutput, Traits
from mixers.decay_attention import decay_attention, why_not_fla
from mixers.head_widths import HeadWidthsConfig
from mixers.implementations import require_fla, resolve_fla
from mixers.masking import zero_padding
from mixers.norms import RMSNorm
from mixers.registry import register


class GatedLinearAttentionState(NamedTuple):
    """memory (B,H,K,V), at least float32."""

    memory: Tensor


class GatedLinearAttentionConfig(HeadWidthsConfig):
    """Options of gated linear attention."""

    decay_rank: int = Field(16, gt=0, description="width between the two projections that set the decay")
    decay_temperature: float = Field(16.0, gt=0, description="tau: the decay is sigmoid(...)^(1/tau)")
    use_output_gate: bool = True
    norm_eps: float = Field(1e-5, gt=0)
    chunk_size: int = Field(
        32, gt=0, description="tokens handled as products of matrices, rounded up to a power of two; changes speed only"
    )
    impl: Literal["auto", "reference", "fla"] = "auto"


@register("gla")
class GatedLinearAttention(Mixer):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T,  y_t = W_o [norm(S_t^T q_t) * silu(W_g x_t)].

    q = W_q x / sqrt(K), k = W_k x, v = W_v x; a = sigmoid(W_2 W_1 x + b)^(1/tau), one for each key channel, from a
    projection of low rank; norm is RMSNorm over each head, its scale shared by the heads.

    Shapes: x (B,T,D); q, k and the decay a (B,T,H,K); v and the gate (B,T,H,V). The state is S (B,H,K,V), in float32
    or float64.

    Padding: padded tokens write nothing, forget nothing, and their y is zero.

    ``impl``: ``reference`` halves chunks of tokens into products of matrices and hands the state from chunk to
    chunk; ``fla`` calls flash-linear-attention's Triton kernels on CUDA. ``auto`` takes fla on CUDA where it is
    installed, except in float64 and for odd K or V.

    Raises:
        UserError: ``fla`` is asked for and can't run here; a mask of the wrong shape or dtype.

    Source: Yang, Wang, Shen, Panda, Kim, arXiv:2312.06635. Ours lets every width be chosen freely (the paper takes
    K = V / 2), has no bias in the gate, starts b at zero, where a is 0.958, and all weights normal with variance
    1 / fan-in.
    """

    Config = GatedLinearAttentionConfig
    traits = Traits(state_growth="constant")
    family = "gated recurrence"
    source = "arXiv:2312.06635"
    config: GatedLinearAttentionConfig

    def __init__(self, config: GatedLinearAttentionConfig) -> None:
        super().__init__(config)
        if config.impl == "fla":
            require_fla("mixer 'gla'")
        key_width = config.n_heads * config.head_key_dim
        value_width = config.n_heads * config.head_value_dim
        self.q = nn.Linear(config.d_model, key_width, bias=False)
        self.k = nn.Linear(config.d_model, key_width, bias=False)
        self.v = nn.Linear(config.d_model, value_width, bias=False)
        self.decay_down = nn.Linear(config.d_model, config.decay_rank, bias=False)
        self.decay_up = nn.Linear(config.decay_rank, key_width)
        self.gate = nn.Linear(config.d_model, value_width, bias=False) if config.use_output_gate else None
        self.norm = RMSNorm(config.head_value_dim, eps=config.norm_eps)
        self.out = nn.Linear(value_width, config.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in self._linears():
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(self.decay_up.bias)
        self.norm.reset_parameters()

    def _linears(self) -> list[nn.Linear]:
        return [module for module in self.children() if isinstance(module, nn.Linear)]

    @property
    def impl(self) -> str:
        weight = self.q.weight
        unsupported = why_not_fla(weight.dtype, self.config.head_key_dim, self.config.head_value_dim)
        return resolve_fla(self.config.impl, weight.device, "mixer 'gla'", unsupported)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> GatedLinearAttentionState:
        config = self.config
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch_size, config.n_heads, config.head_key_dim, config.head_value_dim)
        return GatedLinearAttentionState(torch.zeros(shape, device=device, dtype=wide))

    def forward(
        self,
        x: Tensor,
        state: GatedLinearAttentionState | None = None,
        *,
        return_state: bool = False,
        mask: Tensor | None = None,
    ) -> MixerOutput:
        config = self.config
        x = zero_padding(x, mask)  # no projection but that of the decay has a bias: padded tokens stay zero
        q = self.q(x).unflatten(-1, (-1, config.head_key_dim)) * config.head_key_dim**-0.5
        k = self.k(x).unflatten(-1, (-1, config.head_key_dim))
        v = self.v(x).unflatten(-1, (-1, config.head_value_dim))
        # At least float32: rounded logs would add up over the tokens.
        logits = self.decay_up(self.decay_down(x)).to(torch.promote_types(x.dtype, torch.float32))
        log_decay = (functional.logsigmoid(logits) / config.decay_temperature).view_as(k)

        memory = None if state is None else state.memory
        core = decay_attention(q, k, v, log_decay, memory, mask, impl=self.impl, chunk_size=config.chunk_size)
        heads = self.norm(core.y.to(v.dtype))
        if self.gate is not None:
            heads = heads * functional.silu(self.gate(x).view_as(heads))
        y = self.out(heads.flatten(2))
        return MixerOutput(y, GatedLinearAttentionState(core.state) if return_state else None, {})

    def flops_per_token(self, context: int) -> float:
        """Projections, and two products of K x V for each head: the write and the read. Free of the context."""
        config = self.config
        projections = 2 * sum(linear.weight.numel() for linear in self._linears())
        return float(projections + 4 * config.n_heads * config.head_key_dim * config.head_value_dim)
