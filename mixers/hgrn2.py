"""HGRN2: a gated recurrence with an expanded state; what a channel forgets is what it takes in."""

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


class HGRN2State(NamedTuple):
    """memory (B,H,K,V), at least float32."""

    memory: Tensor


class HGRN2Config(HeadWidthsConfig):
    """Options of HGRN2."""

    lower_bound: float = Field(0.0, ge=0, lt=1, description="least forget gate: no channel forgets faster")
    norm_eps: float = Field(1e-5, gt=0)
    chunk_size: int = Field(
        32, gt=0, description="tokens handled as products of matrices, rounded up to a power of two; changes speed only"
    )
    impl: Literal["auto", "reference", "fla"] = "auto"


@register("hgrn2")
class HGRN2(Mixer):
    """S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T,  y_t = W_o norm(S_t^T q_t).

    f = l + (1 - l) sigmoid(W_f x), the forget gate, at least the lower bound l; 1 - f takes the place of the key, so
    that a channel of the state is a running mean of values. q = silu(W_q x), the output gate; v = W_v x; norm is
    RMSNorm over all heads together.

    Shapes: x (B,T,D); q and f (B,T,H,K); v (B,T,H,V). The state is S (B,H,K,V), in float32 or float64.

    Padding: padded tokens write nothing, forget nothing, and their y is zero.

    ``impl``: ``reference`` halves chunks of tokens into products of matrices and hands the state from chunk to
    chunk; ``fla`` calls flash-linear-attention's Triton kernels on CUDA. ``auto`` takes fla on CUDA where it is
    installed, except in float64 and for odd K or V.

    Raises:
        UserError: ``fla`` is asked for and can't run here; a mask of the wrong shape or dtype.

    Source: Qin et al., arXiv:2404.07904. There the lower bounds of all layers are learned together and rise with the
    depth; ours is an option of the layer. Ours also lets every width be chosen freely (the paper takes K = V), and
    starts all weights normal with variance 1 / fan-in. flash-linear-attention's layer makes heads K = 128 wide and
    scales q by 1/sqrt(K), which the norm undoes.
    """

    Config = HGRN2Config
    traits = Traits(state_growth="constant")
    family = "gated recurrence"
    source = "arXiv:2404.07904"
    config: HGRN2Config

    def __init__(self, config: HGRN2Config) -> None:
        super().__init__(config)
        if config.impl == "fla":
            require_fla("mixer 'hgrn2'")
        key_width = config.n_heads * config.head_key_dim
        value_width = config.n_heads * config.head_value_dim
        self.q = nn.Linear(config.d_model, key_width, bias=False)
        self.forget = nn.Linear(config.d_model, key_width, bias=False)
        self.v = nn.Linear(config.d_model, value_width, bias=False)
        self.norm = RMSNorm(value_width, eps=config.norm_eps)
        self.out = nn.Linear(value_width, config.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.q, self.forget, self.v, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.norm.reset_parameters()

    @property
    def impl(self) -> str:
        weight = self.q.weight
        unsupported = why_not_fla(weight.dtype, self.config.head_key_dim, self.config.head_value_dim)
        return resolve_fla(self.config.impl, weight.device, "mixer 'hgrn2'", unsupported)

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> HGRN2State:
        config = self.config
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch_size, config.n_heads, config.head_key_dim, config.head_value_dim)
        return HGRN2State(torch.zeros(shape, device=device, dtype=wide))

    def forward(
        self, x: Tensor, state: HGRN2State | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        config = self.config
        x = zero_padding(x, mask)  # no projection has a bias: a padded token stays zero to the end
        q = functional.silu(self.q(x)).unflatten(-1, (-1, config.head_key_dim))
        v = self.v(x).unflatten(-1, (-1, config.head_value_dim))
        k, log_decay = self._gates(x)

        memory = None if state is None else state.memory
        core = decay_attention(
            q, k.view_as(q), v, log_decay.view_as(q), memory, mask, impl=self.impl, chunk_size=config.chunk_size
        )
        y = self.out(self.norm(core.y.to(v.dtype).flatten(2)))
        return MixerOutput(y, HGRN2State(core.state) if return_state else None, {})

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """1 - f and ln f (B,T,H K), at least float32: rounded logs would add up over the tokens.

        Neither is taken from f, which rounds to zero or one: ln f from logs, 1 - f = (1 - l) sigmoid(-W_f x)."""
        logits = self.forget(x).to(torch.promote_types(x.dtype, torch.float32))
        bound = torch.full((), self.config.lower_bound, dtype=logits.dtype, device=logits.device)
        log_forget = torch.logaddexp(bound.log(), torch.log1p(-bound) + functional.logsigmoid(logits))
        return (1 - bound) * torch.sigmoid(-logits), log_forget

    def flops_per_token(self, context: int) -> float:
        """Projections, and two products of K x V for each head: the write and the read. Free of the context."""
        config = self.config
        projections = 2 * sum(linear.weight.numel() for linear in (self.q, self.forget, self.v, self.out))
        return float(projections + 4 * config.n_heads * config.head_key_dim * config.head_value_dim)
