"""Linear attention: a sum of outer products of features, read by the query's features."""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mixers.base import Mixer, MixerOutput, Traits
from mixers.chunking import chunk_plan, join_chunks, split_chunks
from mixers.config import MixerConfig
from mixers.feature_maps import FeatureMap, apply_feature_map, n_features
from mixers.implementations import require_fla, resolve_fla
from mixers.masking import zero_padding
from mixers.registry import register

# Smallest normaliser: with relu features a query may be orthogonal to all keys seen.
MIN_NORMALISER = 1e-6
# K of the taylor map unless given: its F grows with K^2.
TAYLOR_KEY_DIM = 16


class LinearAttentionState(NamedTuple):
    """memory (B,H,F,V), the sum of phi(k) v^T; key_sum (B,H,F), the sum of phi(k), None unless normalised.
    At least float32."""

    memory: Tensor
    key_sum: Tensor | None


class LinearAttentionConfig(MixerConfig):
    """Options of linear attention."""

    n_heads: int = Field(1, gt=0, description="H")
    key_dim: int | None = Field(
        None, gt=0, description="K, query and key width of a head; None: d_model / n_heads, and 16 for taylor"
    )
    value_dim: int | None = Field(None, gt=0, description="V, value width of a head; None: d_model / n_heads")
    feature_map: FeatureMap = "elu"
    normalize: bool = Field(True, description="divide by phi(q) . sum phi(k), so that weights sum to one")
    chunk_size: int = Field(64, gt=0, description="tokens handled as one masked product; changes speed only")
    impl: Literal["auto", "reference", "fla"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.n_heads and None in (self.key_dim, self.value_dim):
            raise ValueError(
                f"d_model={self.d_model} isn't divisible by n_heads={self.n_heads}; "
                "change one, or set key_dim and value_dim"
            )
        if self.normalize and self.feature_map == "identity":
            raise ValueError(
                "normalize=true divides by phi(q).phi(k), which feature_map='identity' lets be zero or negative; "
                "set normalize=false or choose elu, relu or taylor"
            )
        return self

    @property
    def head_key_dim(self) -> int:
        """K, resolved."""
        if self.key_dim is not None:
            return self.key_dim
        return TAYLOR_KEY_DIM if self.feature_map == "taylor" else self.d_model // self.n_heads

    @property
    def head_value_dim(self) -> int:
        """V, resolved."""
        return self.d_model // self.n_heads if self.value_dim is None else self.value_dim

    @property
    def n_features(self) -> int:
        """F, width of phi."""
        return n_features(self.feature_map, self.head_key_dim)


@register("linear_attention")
class LinearAttention(Mixer):
    """S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),  y_t = W_o phi(q_t)^T S_t / max(phi(q_t)^T z_t, eps).

    Shapes: x (B,T,D); q, k (B,T,H,K); v (B,T,H,V); phi (...,K) -> (...,F). The state, S (B,H,F,V) and z (B,H,F),
    is float32, or float64 for float64 inputs. Without ``normalize`` there is no z. eps is 1e-6.

    Padding: padded tokens write nothing and their y is zero.

    ``impl``: ``reference`` computes chunks of tokens as masked products and hands sums from chunk to chunk;
    ``fla`` calls flash-linear-attention's Triton kernels on CUDA, with the features rounded to the dtype of the
    activations. ``auto`` takes fla on CUDA where it is installed, except in float64.

    Raises:
        UserError: ``fla`` is asked for and can't run here; a mask of the wrong shape or dtype.

    Source: Katharopoulos et al., arXiv:2006.16236; taylor from Based, arXiv:2402.18668. Ours has no biases, all
    weights start normal with variance 1 / fan-in, and the taylor map keeps each product of two features once.
    """

    Config = LinearAttentionConfig
    family = "linear attention"
    source = "arXiv:2006.16236"
    traits = Traits(state_growth="constant")
    config: LinearAttentionConfig

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__(config)
        if config.impl == "fla":
            require_fla("mixer 'linear_attention'")
        key_width = config.n_heads * config.head_key_dim
        value_width = config.n_heads * config.head_value_dim
        self.q = nn.Linear(config.d_model, key_width, bias=False)
        self.k = nn.Linear(config.d_model, key_width, bias=False)
        self.v = nn.Linear(config.d_model, value_width, bias=False)
        self.out = nn.Linear(value_width, config.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.q, self.k, self.v, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    @property
    def impl(self) -> str:
        weight = self.q.weight
        unsupported = "float64" if weight.dtype == torch.float64 else ""
        return resolve_fla(self.config.impl, weight.device, "mixer 'linear_attention'", unsupported)

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> LinearAttentionState:
        config = self.config
        wide = torch.promote_types(dtype, torch.float32)
        memory = torch.zeros(
            batch_size, config.n_heads, config.n_features, config.head_value_dim, device=device, dtype=wide
        )
        return LinearAttentionState(memory, memory.new_zeros(memory.shape[:3]) if config.normalize else None)

    def forward(
        self,
        x: Tensor,
        state: LinearAttentionState | None = None,
        *,
        return_state: bool = False,
        mask: Tensor | None = None,
    ) -> MixerOutput:
        config, impl = self.config, self.impl
        x = zero_padding(x, mask)
        q, k = (linear(x).unflatten(-1, (-1, config.head_key_dim)) for linear in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, config.head_value_dim))
        if state is None:
            state = self.initial_state(x.shape[0], device=x.device, dtype=x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        # The sums run over the whole sequence: autocast must not round them to half precision.
        with torch.autocast(x.device.type, enabled=False):
            phi_q = apply_feature_map(config.feature_map, q.to(wide))
            phi_k = zero_padding(apply_feature_map(config.feature_map, k.to(wide)), mask)
            if impl == "fla" and x.shape[1] > 0:
                heads, state = _fla(phi_q, phi_k, v, state)
            else:
                heads, state = linear_attention_chunked(phi_q, phi_k, v.to(wide), state, config.chunk_size)
        y = self.out(heads.to(v.dtype).flatten(2))
        return MixerOutput(zero_padding(y, mask), state if return_state else None, {})

    def flops_per_token(self, context: int) -> float:
        """Projections; for each head one product with the state to read, one to write, and the token's own
        weight; with ``normalize`` also the normaliser. Free of the context."""
        config = self.config
        n_features, value_dim = config.n_features, config.head_value_dim
        projections = 2 * sum(linear.weight.numel() for linear in (self.q, self.k, self.v, self.out))
        per_head = 2 * (2 * n_features * value_dim + n_features + value_dim)
        normaliser = 2 * n_features if config.normalize else 0
        return float(projections + config.n_heads * (per_head + normaliser))


def linear_attention_chunked(
    q: Tensor, k: Tensor, v: Tensor, state: LinearAttentionState, chunk_size: int
) -> tuple[Tensor, LinearAttentionState]:
    """y_t = q_t^T S_t / max(q_t^T z_t, eps), with S and z as sums over k_s v_s^T and k_s, s <= t.

    Shapes: features q, k (B,T,H,F), v (B,T,H,V) -> y (B,T,H,V) and the state after the last token. Not divided
    when ``state.key_sum`` is None.

    Within a chunk of C tokens the scores q k^T (C,C) are masked to s <= t; everything before the chunk comes in
    by the state at its start. T C + T F V / C work and memory for the scores and the states.
    """
    n_tokens = q.shape[1]
    plan = chunk_plan(n_tokens, chunk_size)
    q, k, v = (split_chunks(x, *plan) for x in (q, k, v))  # (B,H,n,C,...)
    scores = (q @ k.transpose(-1, -2)).tril()
    starts, memory = _running_sums(state.memory, k.transpose(-1, -2) @ v)
    y = scores @ v + q @ starts
    if state.key_sum is None:
        return join_chunks(y, n_tokens), LinearAttentionState(memory, None)
    key_starts, key_sum = _running_sums(state.key_sum, k.sum(-2))
    weight_sum = scores.sum(-1, keepdim=True) + q @ key_starts.unsqueeze(-1)
    return join_chunks(y / weight_sum.clamp_min(MIN_NORMALISER), n_tokens), LinearAttentionState(memory, key_sum)


def _running_sums(start: Tensor, per_chunk: Tensor) -> tuple[Tensor, Tensor]:
    """The state (B,H,n,...) at the start of every chunk, and the one after the last (B,H,...)."""
    if per_chunk.shape[2] == 1:
        return start.unsqueeze(2), start + per_chunk.squeeze(2)
    after = per_chunk.cumsum(2) + start.unsqueeze(2)
    return torch.cat([start.unsqueeze(2), after[:, :, :-1]], dim=2), after[:, :, -1].clone()


def _fla(q: Tensor, k: Tensor, v: Tensor, state: LinearAttentionState) -> tuple[Tensor, LinearAttentionState]:
    """The same on CUDA: numerators by the kernel, normalisers by a float32 cumulative sum.

    fla normalises too, but keeps the sum of keys in the dtype of the activations.
    """
    from fla.ops.linear_attn import chunk_linear_attn, fused_recurrent_linear_attn

    kernel = fused_recurrent_linear_attn if q.shape[1] == 1 else chunk_linear_attn
    y, memory = kernel(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        scale=1.0,
        initial_state=state.memory,
        output_final_state=True,
        normalize=False,
    )
    if state.key_sum is None:
        return y, LinearAttentionState(memory, None)
    key_sums = state.key_sum.unsqueeze(1) + k.cumsum(1)
    weight_sum = (q * key_sums).sum(-1, keepdim=True).clamp_min(MIN_NORMALISER)
    return y / weight_sum, LinearAttentionState(memory, key_sums[:, -1].clone())
