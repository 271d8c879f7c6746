"""TTT-Linear: the state is a linear model, trained on every token by a gradient step of its own loss."""

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


class TTTLinearState(NamedTuple):
    """weight (B,H,K,K) and bias (B,H,1,K) at the start of the unfinished mini-batch; of its W < C tokens the keys k
    and the gradients g (B,H,W,K), times their step sizes. At least float32."""

    weight: Tensor
    bias: Tensor
    k: Tensor
    g: Tensor


class TTTLinearConfig(MixerConfig):
    """Options of TTT-Linear."""

    n_heads: int = Field(1, gt=0, description="H; a head's width K is d_model / n_heads")
    chunk_size: int = Field(16, gt=0, description="tokens of an inner mini-batch, whose gradients share one model")
    base_lr: float = Field(1.0, gt=0, description="largest inner step size, before the division by K")
    inner_norm_eps: float = Field(1e-6, gt=0)
    norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} isn't divisible by n_heads={self.n_heads}; change one")
        if self.head_dim < 2:
            raise ValueError(
                f"the inner layer norm needs a head width d_model / n_heads of at least 2, got {self.head_dim}; "
                "use fewer heads"
            )
        return self

    @property
    def head_dim(self) -> int:
        """K."""
        return self.d_model // self.n_heads


@register("ttt")
class TTTLinear(Mixer):
    """y_t = W_o norm(f_t(q_t)), f_t(u) = u + LN(u S_t + b_t), trained on every token before it is read.

    With i = 1..C the place of token t in its mini-batch, S_0, b_0 the model at the mini-batch's start and

        l(S, b; s) = 1/2 |f(k_s) - v_s|^2 = 1/2 |LN(k_s S + b) - (v_s - k_s)|^2
        eta_s = base_lr / K * sigmoid(w_lr x_s + b_lr)

        S_t = S_0 - c_i sum_{s <= t in the mini-batch} eta_s dl/dS (S_0, b_0; s),   b_t alike

    c_i >= 0 is learned and starts at 1/i, so that a read sees a mean of gradients; the model at the end of a
    mini-batch starts the next. LN has a learned scale and shift for each head; norm is RMSNorm over all heads.
    The gradients are closed forms in torch, and reads are a masked product (k_s q_t + 1) with the gradients, so
    no S_t is ever built within a mini-batch, and training reaches through the steps.

    Shapes: x (B,T,D); q, k, v (B,T,H,K). State: S (B,H,K,K) and b (B,H,1,K), which start from learned values, in
    float32 or float64, and keys and gradients of the unfinished mini-batch. That outputs depend on ``chunk_size``
    is part of the layer; how the tokens are cut into calls changes nothing.

    Padding: padded tokens train nothing and their y is zero; they do count as places in a mini-batch.

    Raises:
        UserError: a mask of the wrong shape or dtype.

    Source: Sun et al. 2024, arXiv:2407.04620. Ours leaves out rotary positions and short convolutions on q and k
    (the block around it has them) and the output gate, and starts S with variance 1 / K.
    """

    Config = TTTLinearConfig
    traits = Traits(state_growth="constant", exact_chunking=False)
    family = "fast weights"
    source = "Sun et al. 2024, arXiv:2407.04620"
    config: TTTLinearConfig

    def __init__(self, config: TTTLinearConfig) -> None:
        super().__init__(config)
        n_heads, head_dim = config.n_heads, config.head_dim
        self.q = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v = nn.Linear(config.d_model, config.d_model, bias=False)
        self.lr = nn.Linear(config.d_model, n_heads)
        self.place_scale = nn.Parameter(torch.empty(config.chunk_size))
        self.weight = nn.Parameter(torch.empty(n_heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(n_heads, 1, head_dim))
        self.inner_scale = nn.Parameter(torch.empty(n_heads, 1, head_dim))
        self.inner_shift = nn.Parameter(torch.empty(n_heads, 1, head_dim))
        self.out_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices normal with variance 1 / fan-in, c_i = 1/i, the inner norm neutral, biases zero."""
        for linear in (self.q, self.k, self.v, self.lr, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.normal_(self.weight, std=self.config.head_dim**-0.5)
        nn.init.ones_(self.inner_scale)
        for zero in (self.lr.bias, self.bias, self.inner_shift):
            nn.init.zeros_(zero)
        with torch.no_grad():
            self.place_scale.copy_(1 / torch.arange(1, self.config.chunk_size + 1))
        self.out_norm.reset_parameters()

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """The initial model is a state, the scales have their own zero point: no weight decay."""
        names = ("weight", "bias", "place_scale", "inner_scale", "inner_shift", "lr.bias")
        return {name: ParameterOptions(weight_decay=False) for name in names}

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> TTTLinearState:
        """The learned initial model for everyone, and an empty queue."""
        wide = torch.promote_types(dtype, torch.float32)
        weight, bias = (part.to(device=device, dtype=wide) for part in (self.weight, self.bias))
        queue = torch.zeros(batch_size, self.config.n_heads, 0, self.config.head_dim, device=device, dtype=wide)
        return TTTLinearState(
            weight.expand(batch_size, *weight.shape), bias.expand(batch_size, *bias.shape), queue, queue.clone()
        )

    def forward(
        self, x: Tensor, state: TTTLinearState | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        x = zero_padding(x, mask)
        if state is None:
            state = self.initial_state(x.shape[0], device=x.device, dtype=x.dtype)
        wide = state.weight.dtype
        q, k, v = (linear(x).unflatten(-1, (-1, self.config.head_dim)) for linear in (self.q, self.k, self.v))
        step = self.lr(x).to(wide).sigmoid() * (self.config.base_lr / self.config.head_dim)
        step = zero_padding(step, mask)
        heads_first = (part.to(wide).transpose(1, 2) for part in (q, k, v, step.unsqueeze(-1)))
        # The model sums up steps of the whole sequence: autocast must not round it to half precision.
        with torch.autocast(x.device.type, enabled=False):
            reads, state = self._train_and_read(*heads_first, state, return_state)
        y = self.out(self.out_norm(reads.transpose(1, 2).flatten(2).to(v.dtype)))
        return MixerOutput(zero_padding(y, mask), state if return_state else None, {})

    def _train_and_read(
        self, q: Tensor, k: Tensor, v: Tensor, step: Tensor, state: TTTLinearState, return_state: bool
    ) -> tuple[Tensor, TTTLinearState]:
        """f_t(q_t) (B,H,T,K) and the state after the last token, from q, k, v (B,H,T,K) and eta (B,H,T,1)."""
        n_tokens, chunk_size = q.shape[2], self.config.chunk_size
        scale, shift = self.inner_scale.to(q.dtype), self.inner_shift.to(q.dtype)
        place_scale = self.place_scale.to(q.dtype).relu()
        reads = [q[:, :, :0]]
        for start, stop in chunk_spans(state.k.shape[2], n_tokens, chunk_size):
            first = state.k.shape[2]
            last = first + stop - start
            query, key = q[:, :, start:stop], k[:, :, start:stop]
            before = key @ state.weight + state.bias
            target = v[:, :, start:stop] - key
            gradient = layer_norm_gradient(before, target, scale, shift, self.config.inner_norm_eps)
            state = state._replace(
                k=torch.cat([state.k, key], dim=2),
                g=torch.cat([state.g, step[:, :, start:stop] * gradient], dim=2),
            )
            # The bias is the weight of one more input, which always is 1.
            products = (query @ state.k.transpose(-1, -2) + 1).tril(first)
            change = place_scale[first:last, None] * (products @ state.g)
            inner = normalised(query @ state.weight + state.bias - change, self.config.inner_norm_eps)[0]
            reads.append(query + scale * inner + shift)
            # Nothing reads the model after the call's last mini-batch, unless the state goes on.
            if last == chunk_size and (return_state or stop < n_tokens):
                state = TTTLinearState(
                    state.weight - place_scale[-1] * (state.k.transpose(-1, -2) @ state.g),
                    state.bias - place_scale[-1] * state.g.sum(2, keepdim=True),
                    # Copies: slices would keep the finished mini-batch alive as long as the state.
                    state.k[:, :, :0].clone(),
                    state.g[:, :, :0].clone(),
                )
        return torch.cat(reads, dim=2), state

    def flops_per_token(self, context: int) -> float:
        """Projections; for each head the model on key and query, and for every token of the mini-batch so far one
        product with the query and one with the gradients. The step between mini-batches isn't in it."""
        config = self.config
        projections = 2 * sum(part.weight.numel() for part in (self.q, self.k, self.v, self.lr, self.out))
        n_in_chunk = context % config.chunk_size + 1
        return float(projections + 4 * config.n_heads * config.head_dim * (config.head_dim + n_in_chunk))


def normalised(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(z - mean) / std over the last dimension, and 1 / std, std = sqrt(variance + eps)."""
    centred = z - z.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * inverse, inverse


def layer_norm_gradient(z: Tensor, target: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """d/dz of 1/2 |LN(z) - target|^2, LN(z) = scale * (z - mean) / std + shift; all of shape (...,K)."""
    unit, inverse = normalised(z, eps)
    to_unit = scale * (scale * unit + shift - target)
    along = unit * (to_unit * unit).mean(-1, keepdim=True)
    return inverse * (to_unit - to_unit.mean(-1, keepdim=True) - along)
