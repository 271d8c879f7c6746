"""Fast-weight MLP: a SwiGLU network for each sequence, trained by gradient descent while the sequence goes by."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mixers.base import Mixer, MixerOutput, ParameterOptions, Traits
from mixers.chunking import chunk_spans
from mixers.config import MixerConfig
from mixers.masking import zero_padding
from mixers.norms import RMSNorm
from mixers.registry import register
from mixers.swiglu import SwiGLUWeights, swiglu, swiglu_activations, swiglu_gradient, with_length_of


class FastMLPState(NamedTuple):
    """weights and momentum (None without it) with a leading B, at least float32; then the W < C tokens of the
    unfinished chunk: k (B,W,H,K), v (B,W,H,V), valid (B,W), 0 at padding."""

    weights: SwiGLUWeights
    momentum: SwiGLUWeights | None
    k: Tensor
    v: Tensor
    valid: Tensor


class FastMLPConfig(MixerConfig):
    """Options of the fast-weight MLP."""

    n_heads: int = Field(1, gt=0, description="H, independent networks")
    key_dim: int | None = Field(None, gt=0, description="K, query and key width of a head; None: d_model / n_heads")
    value_dim: int | None = Field(None, gt=0, description="V, value width of a head; None: d_model / n_heads")
    hidden_dim: int | None = Field(None, gt=0, description="F, hidden width of a head's network; None: 2 K")
    chunk_size: int = Field(32, gt=0, description="tokens between writes: a read sees only earlier chunks")
    lookahead: int = Field(1, ge=0, description="the value written for key t is that of token t + lookahead")
    lr: float = Field(0.1, gt=0, description="step size of the writes")
    momentum: float = Field(0.0, ge=0, lt=1, description="part of the last write that the next one repeats")
    normalise: bool = Field(False, description="after a write, bring every weight column back to its initial length")
    norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.n_heads and None in (self.key_dim, self.value_dim):
            raise ValueError(
                f"d_model={self.d_model} isn't divisible by n_heads={self.n_heads}; "
                "change one, or set key_dim and value_dim"
            )
        if self.lookahead >= self.chunk_size:
            raise ValueError(
                f"lookahead must be below chunk_size={self.chunk_size}, or nothing is ever written; "
                f"got {self.lookahead}"
            )
        return self

    @property
    def head_key_dim(self) -> int:
        """K, resolved."""
        return self.d_model // self.n_heads if self.key_dim is None else self.key_dim

    @property
    def head_value_dim(self) -> int:
        """V, resolved."""
        return self.d_model // self.n_heads if self.value_dim is None else self.value_dim

    @property
    def head_hidden_dim(self) -> int:
        """F, resolved."""
        return 2 * self.head_key_dim if self.hidden_dim is None else self.hidden_dim


@register("fast_mlp")
class FastMLP(Mixer):
    """y_t = W_o norm(f_c(q_t)), f_c a SwiGLU network of three matrices as written by all chunks before t's chunk c.

    q, k = norm(W x), v = W_v x, norm RMSNorm over a head. With the M pairs (t, t+L) inside a chunk,

        loss = 1 / (2 M V) sum_t |f(k_t) - v_{t+L}|^2
        P <- momentum P + d loss / d weights,   weights <- weights - lr P

    and with ``normalise`` each column (the weights that feed one output) is scaled back to its initial length.
    The gradients are closed forms in torch, so training reaches through the writes. Each sequence has its own
    weights, which start from learned ones. Reads of a chunk come before its write: that the outputs depend on the
    chunk length is part of the layer; how the tokens are cut into calls changes nothing.

    Shapes: x (B,T,D); q, k (B,T,H,K); v (B,T,H,V). State: the weights 2 K F + F V for each head (and as much
    momentum, if any), in float32 or float64, and the keys and values of the unfinished chunk.

    Steps that are too long diverge: on MQAR (recipe ``mqar``, chunk_size=8, lookahead=0, one seed) lr=0.1 recalls
    0.88 after 300 training steps, lr=1 ends in NaN, and lr=1 with ``normalise`` recalls 0.92.

    Padding: a pair with a padded token isn't written, y of padded tokens is zero; they do count as places in a
    chunk, so left padding shifts the boundaries.

    Raises:
        UserError: a mask of the wrong shape or dtype.

    Source: the fast-weight MLP that FwPKM is compared with (Zhao & Jones 2026, arXiv:2601.00671): SwiGLU, inner
    lr 0.1. Ours has heads, keys apart from queries, and no output gate. The negative dot product as loss, learned
    step sizes and momentum, and orthogonalised updates are those of :class:`mixers.lact.LaCT`.
    """

    Config = FastMLPConfig
    traits = Traits(state_growth="constant", exact_chunking=False)
    family = "fast weights"
    source = "Zhao & Jones 2026, arXiv:2601.00671"
    config: FastMLPConfig

    def __init__(self, config: FastMLPConfig) -> None:
        super().__init__(config)
        n_heads, key_dim, value_dim = config.n_heads, config.head_key_dim, config.head_value_dim
        hidden_dim = config.head_hidden_dim
        self.q = nn.Linear(config.d_model, n_heads * key_dim, bias=False)
        self.k = nn.Linear(config.d_model, n_heads * key_dim, bias=False)
        self.v = nn.Linear(config.d_model, n_heads * value_dim, bias=False)
        self.q_norm = RMSNorm(key_dim, eps=config.norm_eps)
        self.k_norm = RMSNorm(key_dim, eps=config.norm_eps)
        self.gate = nn.Parameter(torch.empty(n_heads, key_dim, hidden_dim))
        self.up = nn.Parameter(torch.empty(n_heads, key_dim, hidden_dim))
        self.down = nn.Parameter(torch.empty(n_heads, hidden_dim, value_dim))
        self.out_norm = RMSNorm(value_dim, eps=config.norm_eps)
        self.out = nn.Linear(n_heads * value_dim, config.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All matrices normal with variance 1 / fan-in."""
        for linear in (self.q, self.k, self.v, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for norm in (self.q_norm, self.k_norm, self.out_norm):
            norm.reset_parameters()
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """The initial fast weights are a state: no weight decay."""
        return {name: ParameterOptions(weight_decay=False) for name in ("gate", "up", "down")}

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> FastMLPState:
        """The learned initial weights for everyone, no momentum, and an empty queue."""
        config = self.config
        wide = torch.promote_types(dtype, torch.float32)
        start = SwiGLUWeights(*(weight.to(device=device, dtype=wide) for weight in (self.gate, self.up, self.down)))
        weights = SwiGLUWeights(*(weight.expand(batch_size, *weight.shape) for weight in start))
        momentum = SwiGLUWeights(*(torch.zeros_like(weight) for weight in weights)) if config.momentum else None
        return FastMLPState(
            weights,
            momentum,
            torch.zeros(batch_size, 0, config.n_heads, config.head_key_dim, device=device, dtype=wide),
            torch.zeros(batch_size, 0, config.n_heads, config.head_value_dim, device=device, dtype=wide),
            torch.zeros(batch_size, 0, device=device, dtype=wide),
        )

    def forward(
        self, x: Tensor, state: FastMLPState | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        config = self.config
        x = zero_padding(x, mask)
        if state is None:
            state = self.initial_state(x.shape[0], device=x.device, dtype=x.dtype)
        wide = state.v.dtype
        q = self.q_norm(self.q(x).unflatten(-1, (-1, config.head_key_dim)))
        k = self.k_norm(self.k(x).unflatten(-1, (-1, config.head_key_dim)))
        v = self.v(x).unflatten(-1, (-1, config.head_value_dim))
        valid = torch.ones_like(x[..., 0], dtype=wide) if mask is None else mask.to(wide)
        # The weights sum up writes of the whole sequence: autocast must not round them to half precision.
        with torch.autocast(x.device.type, enabled=False):
            reads, state = self._memory(q.to(wide), k.to(wide), v.to(wide), valid, state, return_state)
        y = self.out(self.out_norm(reads.to(v.dtype)).flatten(2))
        return MixerOutput(zero_padding(y, mask), state if return_state else None, {})

    def _memory(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, state: FastMLPState, return_state: bool
    ) -> tuple[Tensor, FastMLPState]:
        """Reads (B,T,H,V) of the new tokens, and the state after them."""
        n_tokens, chunk_size = q.shape[1], self.config.chunk_size
        reads = [v[:, :0]]
        for start, stop in chunk_spans(state.k.shape[1], n_tokens, chunk_size):
            reads.append(swiglu(q[:, start:stop].transpose(1, 2), state.weights).transpose(1, 2))
            state = state._replace(
                k=torch.cat([state.k, k[:, start:stop]], dim=1),
                v=torch.cat([state.v, v[:, start:stop]], dim=1),
                valid=torch.cat([state.valid, valid[:, start:stop]], dim=1),
            )
            is_full = state.k.shape[1] == chunk_size
            # Nothing reads the write of the call's last chunk, unless the state goes on.
            if is_full and (return_state or stop < n_tokens):
                state = self._written(state)
        return torch.cat(reads, dim=1), state

    def _written(self, state: FastMLPState) -> FastMLPState:
        """The state after the chunk in its queue is written; the queue is empty."""
        config = self.config
        n_pairs = config.chunk_size - config.lookahead
        gradient = regression_gradient(
            state.weights,
            state.k[:, :n_pairs].transpose(1, 2),
            state.v[:, config.lookahead :].transpose(1, 2),
            state.valid[:, :n_pairs] * state.valid[:, config.lookahead :],
        )
        momentum = None
        step = gradient
        if state.momentum is not None:
            pairs = zip(state.momentum, gradient, strict=True)
            step = momentum = SwiGLUWeights(*(config.momentum * last + new for last, new in pairs))
        weights = SwiGLUWeights(*(w - config.lr * s for w, s in zip(state.weights, step, strict=True)))
        if config.normalise:
            initial = (self.gate, self.up, self.down)
            weights = SwiGLUWeights(*(with_length_of(w, start) for w, start in zip(weights, initial, strict=True)))
        # Copies: slices would keep the finished chunk alive as long as the state.
        return FastMLPState(
            weights, momentum, state.k[:, :0].clone(), state.v[:, :0].clone(), state.valid[:, :0].clone()
        )

    def flops_per_token(self, context: int) -> float:
        """Projections and one read; a write, once in a chunk, isn't in it. Free of the context."""
        projections = sum(linear.weight.numel() for linear in (self.q, self.k, self.v, self.out))
        read = sum(weight.numel() for weight in (self.gate, self.up, self.down))
        return 2.0 * (projections + read)


def regression_gradient(weights: SwiGLUWeights, k: Tensor, v: Tensor, pair_weight: Tensor) -> SwiGLUWeights:
    """d/d weights of 1/(2 M V) sum_t w_t |f(k_t) - v_t|^2, M = sum_t w_t (at least 1).

    Shapes: k (B,H,C,K), v (B,H,C,V), w (B,C) in {0,1}; every head has a loss of its own.
    """
    activations = swiglu_activations(k, weights)
    scale = pair_weight / (pair_weight.sum(1, keepdim=True).clamp_min(1.0) * v.shape[-1])
    error = scale[:, None, :, None] * (activations.hidden @ weights.down - v)
    return swiglu_gradient(weights, k, activations, error)
