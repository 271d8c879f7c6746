"""Test-time training: the state is a small model, trained on every token by a gradient step of its own loss."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mixers.base import Mixer, MixerOutput, ParameterOptions, Traits
from mixers.chunking import chunk_spans
from mixers.config import MixerConfig
from mixers.masking import zero_padding
from mixers.norms import RMSNorm
from mixers.registry import register
from mixers.rope import rope_tables, rotate


class InnerLayer(NamedTuple):
    """weight (B,H,I,O) and bias (B,H,1,O) at the start of the unfinished mini-batch; of its W < C tokens the layer's
    inputs (B,H,W,I) and the gradients at its outputs (B,H,W,O), times their step sizes. At least float32."""

    weight: Tensor
    bias: Tensor
    inputs: Tensor
    gradients: Tensor


class TTTState(NamedTuple):
    """The inner model, first layer first."""

    layers: tuple[InnerLayer, ...]

    @property
    def n_waiting(self) -> int:
        """W, tokens of the unfinished mini-batch."""
        return self.layers[0].inputs.shape[2]


class TTTConfig(MixerConfig):
    """Options of TTT-Linear and TTT-MLP."""

    inner: Literal["linear", "mlp"] = Field("linear", description="the inner model: one matrix, or two with a GELU")
    n_heads: int = Field(1, gt=0, description="H; a head's width K is d_model / n_heads")
    hidden_dim: int | None = Field(None, gt=0, description="F, hidden width of inner=mlp; None: 4 K")
    chunk_size: int = Field(16, gt=0, description="tokens of an inner mini-batch, whose gradients share one model")
    base_lr: float = Field(1.0, gt=0, description="largest inner step size, before the division by K")
    init_std: float = Field(0.02, gt=0, description="of the inner model's initial weights")
    rope: bool = Field(True, description="rotate q and k by their place in the mini-batch")
    rope_base: float = Field(10_000.0, gt=1)
    use_output_gate: bool = Field(False, description="multiply by gelu(W_g x) before the output projection")
    inner_norm_eps: float = Field(1e-6, gt=0)
    norm_eps: float = Field(1e-6, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} isn't divisible by n_heads={self.n_heads}; change one")
        if self.head_dim < 2:
            raise ValueError(
                f"the inner layer norm needs a head width d_model / n_heads of at least 2, got {self.head_dim}; "
                "use fewer heads"
            )
        if self.rope and self.head_dim % 2:
            raise ValueError(
                f"rope turns pairs: the head width must be even, got {self.head_dim}; change n_heads, or set rope=false"
            )
        if self.inner == "linear" and self.hidden_dim is not None:
            raise ValueError(
                f"hidden_dim={self.hidden_dim} is the width inside inner='mlp'; set that, or leave hidden_dim out"
            )
        return self

    @property
    def head_dim(self) -> int:
        """K."""
        return self.d_model // self.n_heads

    @property
    def inner_shapes(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the inner layers."""
        if self.inner == "linear":
            return [(self.head_dim, self.head_dim)]
        hidden_dim = 4 * self.head_dim if self.hidden_dim is None else self.hidden_dim
        return [(self.head_dim, hidden_dim), (hidden_dim, self.head_dim)]


@register("ttt")
class TTT(Mixer):
    """y_t = W_o norm(f_t(q_t)), f(u) = u + LN(g(u)), trained on every token before it is read.

    ``inner`` is what learns: ``linear`` g(u) = u S + b; ``mlp`` g(u) = gelu(u S1 + b1) S2 + b2. With i = 1..C the
    place of token t in its mini-batch, P_0 the weights and biases of g at the mini-batch's start and

        l(P; s) = 1/2 |f(k_s) - v_s|^2 = 1/2 |LN(g(k_s)) - (v_s - k_s)|^2
        eta_s = base_lr / K * sigmoid(w_lr x_s + b_lr)

        P_t = P_0 - c_i sum_{s <= t in the mini-batch} eta_s dl/dP (P_0; s)

    c_i >= 0 is learned and starts at 1/i, so that a read sees a mean of gradients; the model at the end of a
    mini-batch starts the next. LN has a learned scale and shift for each head; norm is RMSNorm over all heads.
    The gradients are closed forms in torch, and reads are masked products (u_s u_t + 1) of the layers' inputs with
    the gradients (the dual form), so no P_t is ever built within a mini-batch, and training reaches through the steps.

    Shapes: x (B,T,D); q, k, v (B,T,H,K). State: the inner model for each sequence and head, which starts from
    learned values, in float32 or float64, and inputs and gradients of the unfinished mini-batch. That outputs depend
    on ``chunk_size`` is part of the layer; how the tokens are cut into calls changes nothing.

    Padding: padded tokens train nothing and their y is zero; they do count as places in a mini-batch.

    Raises:
        UserError: a mask of the wrong shape or dtype.

    Source: Sun et al. 2024, arXiv:2407.04620. As in the authors' code, the loss carries the factor 1/2, the step
    size the factor 1 / K, rotary positions start anew with each mini-batch, and the inner weights start with std
    0.02. The layer norm divides by the size of g's output, so ``init_std`` sets the pace: weights s times larger
    take s^2 times as long to be turned over by steps of the same ``base_lr``. How ours differs: RMSNorm instead of
    LayerNorm before the output projection, no shared projection with short convolutions for q and k (a pattern puts
    them before the layer), and all projections, w_lr too, start normal with variance 1 / fan-in instead of std 0.02.
    base_lr is 1 for both inner models; the paper takes 0.1 for the MLP, with which a single layer stayed at chance on
    MQAR (16 pairs, 350 steps: 0.06, and 0.997 with 1).
    """

    Config = TTTConfig
    traits = Traits(state_growth="constant", exact_chunking=False)
    family = "fast weights"
    source = "Sun et al. 2024, arXiv:2407.04620"
    config: TTTConfig

    def __init__(self, config: TTTConfig) -> None:
        super().__init__(config)
        width, n_heads, head_dim = config.d_model, config.n_heads, config.head_dim
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.lr = nn.Linear(width, n_heads)
        self.place_scale = nn.Parameter(torch.empty(config.chunk_size))
        shapes = config.inner_shapes
        self.weights = nn.ParameterList(torch.empty(n_heads, n_in, n_out) for n_in, n_out in shapes)
        self.biases = nn.ParameterList(torch.empty(n_heads, 1, n_out) for _, n_out in shapes)
        self.inner_scale = nn.Parameter(torch.empty(n_heads, 1, head_dim))
        self.inner_shift = nn.Parameter(torch.empty(n_heads, 1, head_dim))
        self.out_norm = RMSNorm(width, eps=config.norm_eps)
        self.gate = nn.Linear(width, width, bias=False) if config.use_output_gate else None
        self.out = nn.Linear(width, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections normal with variance 1 / fan-in, the inner weights normal with init_std, c_i = 1/i, the inner
        norm neutral, biases zero."""
        for linear in self._projections():
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for weight in self.weights:
            nn.init.normal_(weight, std=self.config.init_std)
        nn.init.ones_(self.inner_scale)
        for zero in (self.lr.bias, *self.biases, self.inner_shift):
            nn.init.zeros_(zero)
        with torch.no_grad():
            self.place_scale.copy_(1 / torch.arange(1, self.config.chunk_size + 1))
        self.out_norm.reset_parameters()

    def _projections(self) -> list[nn.Linear]:
        return [part for part in self.children() if isinstance(part, nn.Linear)]

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """The initial model is a state, the scales have their own zero point: no weight decay."""
        model = [f"{kind}.{i}" for kind in ("weights", "biases") for i in range(len(self.weights))]
        names = (*model, "place_scale", "inner_scale", "inner_shift", "lr.bias")
        return {name: ParameterOptions(weight_decay=False) for name in names}

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> TTTState:
        """The learned initial model for everyone, and an empty queue."""
        wide = torch.promote_types(dtype, torch.float32)
        layers = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            start, shift = (
                part.to(device=device, dtype=wide).expand(batch_size, *part.shape) for part in (weight, bias)
            )
            no_inputs, no_gradients = (
                torch.zeros(batch_size, weight.shape[0], 0, width, device=device, dtype=wide)
                for width in weight.shape[1:]
            )
            layers.append(InnerLayer(start, shift, no_inputs, no_gradients))
        return TTTState(tuple(layers))

    def forward(
        self, x: Tensor, state: TTTState | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        config = self.config
        x = zero_padding(x, mask)
        if state is None:
            state = self.initial_state(x.shape[0], device=x.device, dtype=x.dtype)
        wide = state.layers[0].weight.dtype
        q, k, v = (linear(x).unflatten(-1, (-1, config.head_dim)) for linear in (self.q, self.k, self.v))
        if config.rope:
            places = (state.n_waiting + torch.arange(x.shape[1], device=x.device)) % config.chunk_size
            tables = rope_tables(places, config.head_dim, base=config.rope_base)
            q, k = rotate(q, tables), rotate(k, tables)
        step = self.lr(x).to(wide).sigmoid() * (config.base_lr / config.head_dim)
        step = zero_padding(step, mask)
        heads_first = (part.to(wide).transpose(1, 2) for part in (q, k, v, step.unsqueeze(-1)))
        # The model sums up steps of the whole sequence: autocast must not round it to half precision.
        with torch.autocast(x.device.type, enabled=False):
            reads, state = self._train_and_read(*heads_first, state, return_state)
        heads = self.out_norm(reads.transpose(1, 2).flatten(2).to(v.dtype))
        if self.gate is not None:
            heads = heads * functional.gelu(self.gate(x), approximate="tanh")
        return MixerOutput(zero_padding(self.out(heads), mask), state if return_state else None, {})

    def _train_and_read(
        self, q: Tensor, k: Tensor, v: Tensor, step: Tensor, state: TTTState, return_state: bool
    ) -> tuple[Tensor, TTTState]:
        """f_t(q_t) (B,H,T,K) and the state after the last token, from q, k, v (B,H,T,K) and eta (B,H,T,1)."""
        n_tokens, chunk_size = q.shape[2], self.config.chunk_size
        scale, shift = self.inner_scale.to(q.dtype), self.inner_shift.to(q.dtype)
        place_scale = self.place_scale.to(q.dtype).relu()
        reads = [q[:, :, :0]]
        for start, stop in chunk_spans(state.n_waiting, n_tokens, chunk_size):
            first = state.n_waiting
            last = first + stop - start
            query, key = q[:, :, start:stop], k[:, :, start:stop]
            target = v[:, :, start:stop] - key
            state = self._queued(state, key, target, step[:, :, start:stop])
            inner = query
            for depth, layer in enumerate(state.layers):
                inner = gelu(inner) if depth else inner
                # The bias is the weight of one more input, which always is 1.
                products = (inner @ layer.inputs.transpose(-1, -2) + 1).tril(first)
                change = place_scale[first:last, None] * (products @ layer.gradients)
                inner = inner @ layer.weight + layer.bias - change
            unit = normalised(inner, self.config.inner_norm_eps)[0]
            reads.append(query + scale * unit + shift)
            # Nothing reads the model after the call's last mini-batch, unless the state goes on.
            if last == chunk_size and (return_state or stop < n_tokens):
                state = TTTState(tuple(stepped(layer, place_scale[-1]) for layer in state.layers))
        return torch.cat(reads, dim=2), state

    def _queued(self, state: TTTState, key: Tensor, target: Tensor, step: Tensor) -> TTTState:
        """The state with what new tokens contribute: each layer's inputs, and eta dl/d(its outputs), both at the
        mini-batch's start; ``target`` is v - k."""
        scale, shift = self.inner_scale.to(key.dtype), self.inner_shift.to(key.dtype)
        inputs, outputs = [], []
        for depth, layer in enumerate(state.layers):
            inputs.append(gelu(outputs[-1]) if depth else key)
            outputs.append(inputs[-1] @ layer.weight + layer.bias)
        gradients = [layer_norm_gradient(outputs[-1], target, scale, shift, self.config.inner_norm_eps)]
        for depth in range(len(outputs) - 1, 0, -1):
            to_inputs = gradients[0] @ state.layers[depth].weight.transpose(-1, -2)
            gradients.insert(0, to_inputs * gelu_slope(outputs[depth - 1]))
        return TTTState(
            tuple(
                layer._replace(
                    inputs=torch.cat([layer.inputs, new], dim=2),
                    gradients=torch.cat([layer.gradients, step * gradient], dim=2),
                )
                for layer, new, gradient in zip(state.layers, inputs, gradients, strict=True)
            )
        )

    def flops_per_token(self, context: int) -> float:
        """Projections; for each head every inner layer on key and query, and back to front all but the first; for
        every token of the mini-batch so far a product with its inputs and one with its gradients. The step between
        mini-batches isn't in it."""
        config = self.config
        n_in_chunk = context % config.chunk_size + 1
        inner = sum(4 * n_in * n_out + 2 * n_in_chunk * (n_in + n_out) for n_in, n_out in config.inner_shapes)
        backward = sum(2 * n_in * n_out for n_in, n_out in config.inner_shapes[1:])
        projections = 2 * sum(part.weight.numel() for part in self._projections())
        return float(projections + config.n_heads * (inner + backward))


def stepped(layer: InnerLayer, place_scale: Tensor) -> InnerLayer:
    """The layer after the mini-batch in its queue; the queue is empty."""
    return InnerLayer(
        layer.weight - place_scale * (layer.inputs.transpose(-1, -2) @ layer.gradients),
        layer.bias - place_scale * layer.gradients.sum(2, keepdim=True),
        # Copies: slices would keep the finished mini-batch alive as long as the state.
        layer.inputs[:, :, :0].clone(),
        layer.gradients[:, :, :0].clone(),
    )


def gelu(z: Tensor) -> Tensor:
    """z/2 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))."""
    return functional.gelu(z, approximate="tanh")


def gelu_slope(z: Tensor) -> Tensor:
    """d/dz of :func:`gelu`."""
    root = math.sqrt(2 / math.pi)
    bend = torch.tanh(root * (z + 0.044715 * z**3))
    return 0.5 * (1 + bend) + 0.5 * z * (1 - bend.square()) * root * (1 + 3 * 0.044715 * z.square())


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
