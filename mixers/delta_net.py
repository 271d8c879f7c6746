"""DeltaNet: a fast-weight matrix that overwrites what a key held before, and never forgets by itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mixers.base import Mixer, MixerOutput, Traits
from mixers.delta_heads import ConvState, DeltaHeads, DeltaHeadsConfig
from mixers.delta_rule import gated_delta_rule, unsupported_by_fla
from mixers.implementations import gated_backward_fault, require_fla, resolve_fla
from mixers.masking import zero_padding
from mixers.norms import RMSNorm
from mixers.registry import register


class DeltaNetState(NamedTuple):
    """conv, what the short convolutions need; memory (B,H,K,V), at least float32."""

    conv: ConvState
    memory: Tensor


class DeltaNetConfig(DeltaHeadsConfig):
    """Options of DeltaNet."""

    negative_eigenvalues: bool = Field(False, description="write strengths in [0,2] instead of [0,1]")


@register("delta_net")
class DeltaNet(Mixer):
    """S_t = S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T,  y_t = W_o norm(S_t q_t).

    b_t = sigmoid(W_b x_t), one for a head, twice that with ``negative_eigenvalues``: I - b k k^T then has the
    eigenvalue 1 - b in [-1,1] and can reflect (arXiv:2411.12537). q, k = l2norm(silu(conv(W x))),
    v = silu(conv(W_v x)), with causal depthwise convolutions; norm is RMSNorm over each head, its scale shared by
    the heads.

    Shapes: x (B,T,D); q, k (B,T,H,K); v (B,T,H,V). The state is S, kept transposed (B,H,K,V), in float32 or
    float64, and the inputs that the convolutions still need.

    Padding: padded tokens write nothing, count as zeros in the convolutions, and their y is zero.

    ``impl``: ``reference`` solves chunks of tokens as triangular systems, and a single token by the rule itself;
    ``fla`` calls flash-linear-attention's Triton kernels on CUDA: those of the gated rule with no decay, as the
    plain one takes no float32. ``auto`` takes fla on CUDA where it is installed and K is at most 256, except in
    float64.

    Raises:
        UserError: ``fla`` is asked for and can't run here; a mask of the wrong shape or dtype.

    Source: Yang, Wang, Zhang, Shen, Kim, arXiv:2406.06484; the rule from Schlag, Irie, Schmidhuber,
    arXiv:2102.11174. Ours leaves out the factor 1/sqrt(K) on q that the norm undoes, lets every width be chosen
    freely, and starts all projections normal with variance 1 / fan-in.
    """

    Config = DeltaNetConfig
    traits = Traits(state_growth="constant")
    family = "delta rule"
    source = "arXiv:2406.06484"
    config: DeltaNetConfig

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__(config)
        if config.impl == "fla":
            require_fla("mixer 'delta_net'")
        self.heads = DeltaHeads(config)
        self.beta = nn.Linear(config.d_model, config.n_heads, bias=False)
        self.norm = RMSNorm(config.head_value_dim, eps=config.norm_eps)
        self.out = nn.Linear(config.n_heads * config.head_value_dim, config.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.heads.reset_parameters()
        self.norm.reset_parameters()
        for linear in (self.beta, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    @property
    def impl(self) -> str:
        weight = self.out.weight
        # By fla's gated kernels without a decay: its ungated ones don't take float32.
        unsupported = unsupported_by_fla(weight.dtype, self.config.head_key_dim) or gated_backward_fault(weight.device)
        return resolve_fla(self.config.impl, weight.device, "mixer 'delta_net'", unsupported)

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> DeltaNetState:
        config = self.config
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch_size, config.n_heads, config.head_key_dim, config.head_value_dim)
        conv = self.heads.initial_state(batch_size, device=device, dtype=dtype)
        return DeltaNetState(conv, torch.zeros(shape, device=device, dtype=wide))

    def forward(
        self, x: Tensor, state: DeltaNetState | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        config, impl = self.config, self.impl
        conv, memory = (None, None) if state is None else state
        x = zero_padding(x, mask)
        q, k, v, conv = self.heads(x, conv, mask)
        beta = self.beta(x).to(torch.promote_types(x.dtype, torch.float32)).sigmoid()
        beta = 2 * beta if config.negative_eigenvalues else beta
        no_decay = torch.zeros_like(beta)
        core = gated_delta_rule(q, k, v, beta, no_decay, memory, mask, chunk_size=config.chunk_size, impl=impl)
        y = zero_padding(self.out(self.norm(core.y.to(v.dtype)).flatten(2)), mask)
        return MixerOutput(y, DeltaNetState(conv, core.state) if return_state else None, {})

    def flops_per_token(self, context: int) -> float:
        """Projections, convolutions, and three products of K x V for each head: what the key holds, the write, the
        read. Free of the context."""
        config = self.config
        projections = 2 * (self.beta.weight.numel() + self.out.weight.numel())
        rule = 6 * config.n_heads * config.head_key_dim * config.head_value_dim
        return float(self.heads.flops_per_token() + projections + rule)
