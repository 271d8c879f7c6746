"""Based: linear attention for what is far, softmax over a small window for what is near, in one layer."""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mixers.base import Mixer, MixerOutput, Traits
from mixers.config import MixerConfig
from mixers.implementations import require_fla
from mixers.linear_attention import TAYLOR_KEY_DIM, LinearAttention, LinearAttentionConfig, LinearAttentionState
from mixers.registry import register
from mixers.softmax import SoftmaxAttention, SoftmaxConfig, SoftmaxState


class BasedState(NamedTuple):
    """linear, the sums over all tokens; window, the cache of the last window-1."""

    linear: LinearAttentionState
    window: SoftmaxState


class BasedConfig(MixerConfig):
    """Options of Based."""

    n_heads: int = Field(1, gt=0, description="H, each d_model / n_heads wide")
    combine: Literal["sum", "split"] = Field(
        "sum",
        description="sum: both attentions have all heads; split: some heads attend linearly, the others by window",
    )
    n_window_heads: int | None = Field(
        None, gt=0, description="heads with the window where combine is split; None: half of them"
    )
    window: int = Field(64, gt=1, description="tokens that the softmax sees, the query's own included")
    key_dim: int = Field(TAYLOR_KEY_DIM, gt=0, description="K of the linear attention: its features grow with K^2")
    normalize: bool = Field(True, description="divide by phi(q) . sum phi(k), so that weights sum to one")
    rope: bool = Field(True, description="rotary positions in the window; False: none")
    chunk_size: int = Field(64, gt=0, description="tokens handled as one masked product; changes speed only")
    impl: Literal["auto", "reference", "fla"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} isn't divisible by n_heads={self.n_heads}; change one")
        if self.combine == "sum" and self.n_window_heads is not None:
            raise ValueError(
                f"n_window_heads={self.n_window_heads} divides the heads, which combine='sum' doesn't; "
                "set combine='split' or leave it out"
            )
        if self.combine == "split" and not 0 < self.window_heads < self.n_heads:
            raise ValueError(
                f"combine='split' needs heads of both kinds: of n_heads={self.n_heads}, {self.window_heads} have the "
                "window; change n_heads or n_window_heads, or set combine='sum'"
            )
        if self.rope and self.head_dim % 2:
            raise ValueError(
                f"rope turns pairs: the head width must be even, got {self.head_dim}; change n_heads, or set rope=false"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Width of a head's values, and of the window's queries and keys."""
        return self.d_model // self.n_heads

    @property
    def window_heads(self) -> int:
        """Heads that attend by window, resolved."""
        if self.combine == "sum":
            return self.n_heads
        return self.n_heads // 2 if self.n_window_heads is None else self.n_window_heads

    @property
    def linear_heads(self) -> int:
        """Heads that attend linearly, resolved."""
        return self.n_heads if self.combine == "sum" else self.n_heads - self.window_heads


@register("based")
class Based(Mixer):
    """y_t = LinearAttention(x)_t + WindowAttention(x)_t, each with projections of its own.

    The first has the taylor features, phi(q).phi(k) = 1 + q.k / sqrt(K) + (q.k)^2 / (2 K), and sums over all tokens
    s <= t; the second is softmax attention over the last ``window`` tokens. Its weights are exact, and peaked where
    they must tell near tokens apart; the sums reach any distance with a state that doesn't grow.

    ``combine``: with ``sum`` both have all H heads; with ``split`` the heads are shared out among the two, so that
    the sum is one output projection of the heads of both, side by side.

    Shapes: x (B,T,D). The state is that of the two layers: see :class:`LinearAttentionState`, :class:`SoftmaxState`.

    Padding: as in both layers: padded tokens are seen by nobody and their y is zero.

    ``impl``: of the linear attention, ``reference`` or ``fla`` (CUDA). The window is written out with
    ``reference``, else torch's fused attention.

    Raises:
        UserError: ``fla`` is asked for and can't run here; a mask of the wrong shape or dtype.

    Source: Arora et al., arXiv:2402.18668. There the two are layers of their own that follow each other in the
    depth, with convolutions between (flash-linear-attention's layer of this name is the first alone); ours is one
    layer, and patterns set convolutions beside it. The output projections start at half the variance of the two
    layers alone, so that their sum starts at that of one.
    """

    Config = BasedConfig
    traits = Traits(state_growth="window")
    family = "hybrid"
    source = "arXiv:2402.18668"
    config: BasedConfig

    def __init__(self, config: BasedConfig) -> None:
        super().__init__(config)
        if config.impl == "fla":
            require_fla("mixer 'based'")
        self.linear = LinearAttention(
            LinearAttentionConfig(
                d_model=config.d_model,
                n_heads=config.linear_heads,
                key_dim=config.key_dim,
                value_dim=config.head_dim,
                feature_map="taylor",
                normalize=config.normalize,
                chunk_size=config.chunk_size,
                impl=config.impl,
            )
        )
        self.window = SoftmaxAttention(
            SoftmaxConfig(
                d_model=config.d_model,
                n_heads=config.window_heads,
                head_dim=config.head_dim,
                window=config.window,
                rope=config.rope,
                impl="reference" if config.impl == "reference" else "auto",
            )
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for layer in (self.linear, self.window):
            layer.reset_parameters()
            nn.init.normal_(layer.out.weight, std=(2 * layer.out.in_features) ** -0.5)

    @property
    def impl(self) -> str:
        return self.linear.impl

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> BasedState:
        return BasedState(
            self.linear.initial_state(batch_size, device=device, dtype=dtype),
            self.window.initial_state(batch_size, device=device, dtype=dtype),
        )

    def forward(
        self, x: Tensor, state: BasedState | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        linear, window = (None, None) if state is None else state
        far, linear, _ = self.linear(x, linear, return_state=return_state, mask=mask)
        near, window, _ = self.window(x, window, return_state=return_state, mask=mask)
        return MixerOutput(far + near, BasedState(linear, window) if return_state else None, {})

    def flops_per_token(self, context: int) -> float:
        """Those of both layers."""
        return self.linear.flops_per_token(context) + self.window.flops_per_token(context)
