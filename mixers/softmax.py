"""Softmax attention: remembers everything (or a window of it), at a cost that grows with the context."""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mixers.attention import Sinks, attend_flash, attend_reference, attend_sdpa
from mixers.base import Mixer, MixerOutput, ParameterOptions, Traits
from mixers.config import MixerConfig
from mixers.implementations import require_flash_attn
from mixers.masking import zero_padding
from mixers.norms import RMSNorm
from mixers.registry import register
from mixers.rope import rope_tables, rotate
from mixers.sink_tokens import SinkTokens, fill_sink_tokens, no_sink_tokens


class SoftmaxState(NamedTuple):
    """What has been seen: keys (B,G,S,K), already rotated, and values (B,G,S,K) of G key heads; valid (B,S) bool,
    None while no mask was given; position, int64 scalar, the tokens seen so far, padding included; sinks, the sink
    tokens, None without that option."""

    keys: Tensor
    values: Tensor
    valid: Tensor | None
    position: Tensor
    sinks: SinkTokens | None = None


class SoftmaxConfig(MixerConfig):
    """Options of softmax attention."""

    n_heads: int = Field(1, gt=0, description="query heads H")
    n_kv_heads: int | None = Field(None, gt=0, description="key and value heads, dividing n_heads; None: n_heads")
    head_dim: int | None = Field(None, gt=0, description="K, width of a head; None: d_model / n_heads")
    window: int | None = Field(None, gt=0, description="tokens that a query sees, itself included; None: all")
    sink_tokens: int = Field(0, ge=0, description="first tokens of a sequence that stay visible behind the window")
    sink_logits: bool = Field(False, description="one trained logit per head more in the softmax, with no value")
    rope: bool = Field(True, description="rotary positions; False: none")
    rope_base: float = Field(10_000.0, gt=1)
    yarn_factor: float | None = Field(None, ge=1, description="context extension s of YaRN; None: plain rope")
    yarn_original_length: int | None = Field(None, gt=0, description="context that the layer was trained on, for YaRN")
    qk_norm: bool = Field(False, description="RMSNorm over each head's query and key, before the rotation")
    impl: Literal["auto", "reference", "sdpa", "flash_attn"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} isn't divisible by n_heads={self.n_heads}; change one, or set head_dim"
            )
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        if self.rope and self.key_dim % 2:
            raise ValueError(
                f"rope turns pairs: the head width must be even, got {self.key_dim}; change it, or set rope=false"
            )
        if (self.yarn_factor is None) != (self.yarn_original_length is None):
            raise ValueError("yarn_factor and yarn_original_length go together: give both or neither")
        if self.yarn_factor is not None and not self.rope:
            raise ValueError(f"yarn_factor={self.yarn_factor} changes rotary positions: it needs rope=true")
        if self.sink_tokens and self.window is None:
            raise ValueError(
                f"sink_tokens={self.sink_tokens} keeps tokens that a window would drop: set window, or leave it out"
            )
        if self.impl == "flash_attn" and (self.sink_tokens or self.sink_logits):
            raise ValueError("impl='flash_attn' has neither sink_tokens nor sink_logits; use impl='sdpa'")
        return self

    @property
    def key_dim(self) -> int:
        """K, resolved."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def n_key_heads(self) -> int:
        """G, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads


@register("softmax")
class SoftmaxAttention(Mixer):
    """y_t = W_o concat_h sum_{s in N(t)} softmax_s(q_t . k_s / sqrt(K)) v_s, N(t) = {s <= t, s > t - window}.

    Shapes: x (B,T,D); q (B,T,H,K); k, v (B,T,G,K) with G <= H key heads. The state is the cache of keys and
    values: all of them, or with a window the last window-1, as the next query brings its own.

    ``sink_tokens`` n: N(t) also holds the first n real tokens of the sequence, so that up to window + n tokens are
    seen. The state has n more slots of keys, values and positions, from the start on. Sinks keep the rotation of
    their true position: the distance to them grows with t, beyond what was trained on in the end. StreamingLLM counts
    positions within the cache instead, so that theirs stays at window + n; its results are not to be expected from
    adding sinks to a layer with rope that was trained without.

    ``sink_logits``: weights are exp(l_s) / (exp(sink_h) + sum_{N(t)} exp(l_s)), with a trained sink_h per head and no
    value for it: a head may attend to nothing. It starts at 0, the "softmax plus one".

    Padding: padded tokens are seen by nobody and their y is zero. They keep their place in the window and in
    the positions; as rope reads differences only, left padding changes nothing on the real tokens.

    ``impl``: ``auto`` is torch's fused attention (``sdpa``) on every device; ``reference`` writes out the T x S
    scores; ``flash_attn`` calls that package on CUDA, without sinks.

    Raises:
        UserError: ``flash_attn`` is asked for and the package, the device or the dtype doesn't allow it, or
            there is padding; a mask of the wrong shape or dtype.

    Source: Vaswani et al., arXiv:1706.03762; grouped heads arXiv:2305.13245; windows arXiv:2004.05150; rope
    arXiv:2104.09864; YaRN arXiv:2309.00071; sink tokens (StreamingLLM) arXiv:2309.17453; sink logits as in gpt-oss,
    arXiv:2508.10925. Ours has no biases, and all weights start normal with variance 1 / fan-in.
    """

    Config = SoftmaxConfig
    traits = Traits(state_growth="config")
    family = "attention"
    source = "arXiv:1706.03762"
    config: SoftmaxConfig

    def __init__(self, config: SoftmaxConfig) -> None:
        super().__init__(config)
        if config.impl == "flash_attn":
            require_flash_attn("mixer 'softmax'")
        width = config.n_heads * config.key_dim
        key_width = config.n_key_heads * config.key_dim
        self.q = nn.Linear(config.d_model, width, bias=False)
        self.k = nn.Linear(config.d_model, key_width, bias=False)
        self.v = nn.Linear(config.d_model, key_width, bias=False)
        self.out = nn.Linear(width, config.d_model, bias=False)
        self.q_norm = RMSNorm(config.key_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(config.key_dim) if config.qk_norm else None
        self.sink_logits = nn.Parameter(torch.empty(config.n_heads)) if config.sink_logits else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.q, self.k, self.v, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm.reset_parameters()
            self.k_norm.reset_parameters()
        if self.sink_logits is not None:
            nn.init.zeros_(self.sink_logits)

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """Sink logits have no decay: it would pull them to a weight of one, not to none."""
        return {} if self.sink_logits is None else {"sink_logits": ParameterOptions(weight_decay=False)}

    @property
    def impl(self) -> str:
        return "sdpa" if self.config.impl == "auto" else self.config.impl

    @property
    def state_growth(self) -> str:
        """``linear``, or ``window`` with one."""
        return "linear" if self.config.window is None else "window"

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> SoftmaxState:
        empty = torch.zeros(batch_size, self.config.n_key_heads, 0, self.config.key_dim, device=device, dtype=dtype)
        position = torch.zeros((), dtype=torch.int64, device=device)
        return SoftmaxState(empty, empty.clone(), None, position, self._no_sinks(batch_size, device, dtype))

    def _no_sinks(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> SinkTokens | None:
        c = self.config
        if not c.sink_tokens:
            return None
        return no_sink_tokens(batch_size, c.n_key_heads, c.sink_tokens, c.key_dim, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, state: SoftmaxState | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        x = zero_padding(x, mask)
        position = torch.zeros((), dtype=torch.int64, device=x.device) if state is None else state.position
        q, k, v = self._project(x, position)
        sinks = self._no_sinks(x.shape[0], k.device, k.dtype) if state is None else state.sinks
        if sinks is not None:
            sinks = fill_sink_tokens(sinks, k, v, mask, position)
        valid = mask
        if state is not None:
            valid = joined_valid(state, mask, x)
            k = torch.cat([state.keys.to(k.dtype), k], dim=2)
            v = torch.cat([state.values.to(v.dtype), v], dim=2)
        y = self.out(self._attend(q, k, v, valid, position, sinks).transpose(1, 2).flatten(2))
        new_state = self._state(k, v, valid, position + x.shape[1], sinks) if return_state else None
        return MixerOutput(zero_padding(y, mask), new_state, {})

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B,H,T,K) and k, v (B,G,T,K), normalised and rotated."""
        config = self.config
        q, k, v = (linear(x).unflatten(-1, (-1, config.key_dim)) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.rope:
            tables = rope_tables(
                position + torch.arange(x.shape[1], device=x.device),
                config.key_dim,
                base=config.rope_base,
                yarn_factor=config.yarn_factor,
                yarn_original_length=config.yarn_original_length,
            )
            q, k = rotate(q, tables), rotate(k, tables)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, position: Tensor, tokens: SinkTokens | None
    ) -> Tensor:
        window, sinks = self.config.window, None
        if tokens is not None:
            n_cached = k.shape[2] - q.shape[2]
            index = tokens.position + n_cached - position  # counted from the first key
            # Without padding all sequences have the same sinks: one row of the mask serves them all.
            sinks = Sinks(tokens.keys.to(k.dtype), tokens.values.to(v.dtype), index if valid is not None else index[:1])
        if self.impl == "reference":
            return attend_reference(q, k, v, window, valid, sinks, self.sink_logits)
        if self.impl == "sdpa":
            return attend_sdpa(q, k, v, window, valid, sinks, self.sink_logits)
        return attend_flash(q, k, v, window, valid, "mixer 'softmax'")

    def _state(
        self, k: Tensor, v: Tensor, valid: Tensor | None, position: Tensor, sinks: SinkTokens | None
    ) -> SoftmaxState:
        n_keys = k.shape[2]
        first = 0 if self.config.window is None else max(0, n_keys - (self.config.window - 1))
        # Copies: views would keep the whole projection, or the tokens before the window, alive.
        keys, values = (part[:, :, first:].clone(memory_format=torch.contiguous_format) for part in (k, v))
        return SoftmaxState(keys, values, None if valid is None else valid[:, first:].clone(), position, sinks)

    def flops_per_token(self, context: int) -> float:
        """Projections, and 2 products of K for each head and key: H K 4 (min(context + 1, window) + sink_tokens).

        The slots of sink tokens are computed from the first token on, taken or not. Apart from them this is what a
        causal layer needs: the reference path computes all T x S scores of a call and masks half of them; for a
        single token the two agree.
        """
        config = self.config
        n_seen = context + 1 if config.window is None else min(context + 1, config.window)
        projections = 2 * sum(linear.weight.numel() for linear in (self.q, self.k, self.v, self.out))
        return float(projections + 4 * config.n_heads * config.key_dim * (n_seen + config.sink_tokens))


def joined_valid(state: SoftmaxState, mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Which of the cached and the new tokens are real, (B,S+T); None while no mask was ever given."""
    if state.valid is None and mask is None:
        return None
    n_cached = state.keys.shape[2]
    past = x.new_ones(x.shape[0], n_cached, dtype=torch.bool) if state.valid is None else state.valid
    new = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    return torch.cat([past, new], dim=1)
