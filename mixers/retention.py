"""Retention: linear attention whose heads forget at fixed rates, each at its own."""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mixers.base import Mixer, MixerOutput, Traits
from mixers.decay_attention import decay_attention, why_not_fla
from mixers.head_widths import HeadWidthsConfig
from mixers.implementations import gated_backward_fault, require_fla, resolve_fla
from mixers.masking import zero_padding
from mixers.registry import register
from mixers.rope import rope_tables, rotate

# The first head forgets 2^-5 of its memory at a token, every further head half as much.
FIRST_FORGETTING_EXPONENT = 5


class RetentionState(NamedTuple):
    """memory (B,H,K,V), at least float32; position, int64 scalar, the tokens seen so far, padding included, None
    without rope."""

    memory: Tensor
    position: Tensor | None


class RetentionConfig(HeadWidthsConfig):
    """Options of retention."""

    rope: bool = Field(True, description="rotary positions; False: none")
    rope_base: float = Field(10_000.0, gt=1)
    use_output_gate: bool = True
    norm_eps: float = Field(1e-5, gt=0)
    chunk_size: int = Field(32, gt=0, description="tokens handled as one masked product; changes speed only")
    impl: Literal["auto", "reference", "fla"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rope and self.head_key_dim % 2:
            raise ValueError(
                f"rope turns pairs: the key width must be even, got {self.head_key_dim}; change it, or set rope=false"
            )
        if self.head_value_dim == 1:
            raise ValueError("the norm of a head of one value is always zero; set value_dim to at least 2")
        return self


@register("retention")
class Retention(Mixer):
    """S_t = gamma_h S_{t-1} + k_t v_t^T,  y_t = W_o [norm(S_t^T q_t) * silu(W_g x_t)],  gamma_h = 1 - 2^(-5-h).

    q = rope(W_q x) / sqrt(K), k = rope(W_k x), v = W_v x; heads count from h = 0; norm takes mean and variance of a
    head's V channels away and learns nothing.

    Shapes: x (B,T,D); q, k (B,T,H,K); v and the gate (B,T,H,V). The state is S (B,H,K,V), in float32 or float64,
    and the position where rope needs it.

    Padding: padded tokens write nothing, forget nothing, and their y is zero. They count in the positions; as rope
    reads differences only, left padding changes nothing on the real tokens.

    ``impl``: ``reference`` computes chunks of tokens as masked products and hands the state from chunk to chunk;
    ``fla`` calls flash-linear-attention's Triton kernels on CUDA. ``auto`` takes fla on CUDA where it is installed,
    except in float64 and for odd K or V.

    Raises:
        UserError: ``fla`` is asked for and can't run here; a mask of the wrong shape or dtype.

    Source: Sun et al., Retentive Network, arXiv:2307.08621. The paper's xPos is this rotation with the decay as its
    scale. Ours lets every width be chosen freely (the paper takes V = 2 K), leaves out the normalisations of the
    scores that the norm of the output undoes, and starts all weights normal with variance 1 / fan-in.
    flash-linear-attention's layer has RMSNorm with a learned scale in place of our norm without one.
    """

    Config = RetentionConfig
    traits = Traits(state_growth="constant")
    family = "gated recurrence"
    source = "arXiv:2307.08621"
    config: RetentionConfig

    def __init__(self, config: RetentionConfig) -> None:
        super().__init__(config)
        if config.impl == "fla":
            require_fla("mixer 'retention'")
        key_width = config.n_heads * config.head_key_dim
        value_width = config.n_heads * config.head_value_dim
        self.q = nn.Linear(config.d_model, key_width, bias=False)
        self.k = nn.Linear(config.d_model, key_width, bias=False)
        self.v = nn.Linear(config.d_model, value_width, bias=False)
        self.gate = nn.Linear(config.d_model, value_width, bias=False) if config.use_output_gate else None
        self.out = nn.Linear(value_width, config.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in self.children():
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    @property
    def impl(self) -> str:
        weight = self.q.weight
        # A mask makes the decay one of each token, which takes the gated kernel.
        unsupported = why_not_fla(weight.dtype, self.config.head_key_dim, self.config.head_value_dim)
        unsupported = unsupported or gated_backward_fault(weight.device, mended_by_tilelang=False)
        return resolve_fla(self.config.impl, weight.device, "mixer 'retention'", unsupported)

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> RetentionState:
        config = self.config
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch_size, config.n_heads, config.head_key_dim, config.head_value_dim)
        position = torch.zeros((), dtype=torch.int64, device=device) if config.rope else None
        return RetentionState(torch.zeros(shape, device=device, dtype=wide), position)

    def forward(
        self,
        x: Tensor,
        state: RetentionState | None = None,
        *,
        return_state: bool = False,
        mask: Tensor | None = None,
    ) -> MixerOutput:
        config = self.config
        x = zero_padding(x, mask)  # no projection has a bias: a padded token stays zero to the end
        if state is None:
            state = self.initial_state(x.shape[0], device=x.device, dtype=x.dtype)
        q, k = (linear(x).unflatten(-1, (-1, config.head_key_dim)) for linear in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, config.head_value_dim))
        position = state.position
        if position is not None:
            positions = position + torch.arange(x.shape[1], device=x.device)
            tables = rope_tables(positions, config.head_key_dim, base=config.rope_base)
            q, k = rotate(q, tables), rotate(k, tables)
            position = position + x.shape[1]
        q = q * config.head_key_dim**-0.5
        wide = torch.promote_types(x.dtype, torch.float32)
        log_decay = self._log_decay(x.device).to(wide)

        core = decay_attention(q, k, v, log_decay, state.memory, mask, impl=self.impl, chunk_size=config.chunk_size)
        heads = functional.layer_norm(core.y.to(wide), (config.head_value_dim,), eps=config.norm_eps).to(v.dtype)
        if self.gate is not None:
            heads = heads * functional.silu(self.gate(x).view_as(heads))
        y = self.out(heads.flatten(2))
        return MixerOutput(y, RetentionState(core.state, position) if return_state else None, {})

    def _log_decay(self, device: torch.device) -> Tensor:
        """ln gamma_h, (H,), in float64: 1 - 2^(-5-h) itself would round to one from h = 48 on."""
        exponent = FIRST_FORGETTING_EXPONENT + torch.arange(self.config.n_heads, dtype=torch.float64, device=device)
        return torch.log1p(-torch.exp2(-exponent))

    def flops_per_token(self, context: int) -> float:
        """Projections, and two products of K x V for each head: the write and the read. Free of the context."""
        config = self.config
        projections = 2 * sum(linear.weight.numel() for linear in self.children())
        return float(projections + 4 * config.n_heads * config.head_key_dim * config.head_value_dim)
