"""LaCT: a SwiGLU network trained on large chunks at once, and softmax over a window for what is nearer."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mixers.attention import attend_reference, attend_sdpa
from mixers.base import Mixer, MixerOutput, ParameterOptions, Traits
from mixers.chunking import chunk_spans
from mixers.config import MixerConfig
from mixers.masking import zero_padding
from mixers.norms import RMSNorm
from mixers.orthogonal import orthogonalised
from mixers.registry import register
from mixers.rope import rope_tables, rotate
from mixers.softmax import SoftmaxState, joined_valid
from mixers.swiglu import SwiGLUWeights, swiglu, swiglu_activations, swiglu_gradient, with_length_of

STEPS_PER_CHUNK = 2.0  # initial step size times chunk length: 0.001 at 2048 tokens
UNIT_EPS = 1e-5


class LaCTState(NamedTuple):
    """weights and momentum (None without it) with a leading B, at least float32; of the W < C tokens of the
    unfinished chunk k, v (B,W,H,K), step sizes (B,W,H,3), 0 at padding, the part of the last update that a token
    wants to keep (B,W,H), None without momentum, and valid (B,W); the window's cache and the position."""

    weights: SwiGLUWeights
    momentum: SwiGLUWeights | None
    k: Tensor
    v: Tensor
    steps: Tensor
    keep: Tensor | None
    valid: Tensor
    window: SoftmaxState


class LaCTConfig(MixerConfig):
    """Options of LaCT."""

    n_heads: int = Field(1, gt=0, description="H, independent networks; their width K is d_model / n_heads")
    hidden_dim: int | None = Field(None, gt=0, description="F, hidden width of a head's network; None: K")
    chunk_size: int = Field(64, gt=0, description="tokens between updates: the network knows earlier chunks only")
    window: int | None = Field(
        None,
        ge=0,
        description="tokens that the softmax sees, its own included; None: chunk_size; 0: no softmax",
    )
    n_window_heads: int | None = Field(None, gt=0, description="heads of the softmax; None: n_heads")
    base_lr: float | None = Field(
        None, gt=0, description="step size of a token where its gate is 0; None: 2 / chunk_size"
    )
    momentum: bool = Field(True, description="an update repeats a learned part of the last one")
    muon: bool = Field(True, description="orthogonalise every update (Newton-Schulz): all its directions count alike")
    normalise: bool = Field(True, description="after an update, bring every weight column back to its initial length")
    silu: bool = Field(True, description="silu on the network's q, k and v")
    rope: bool = Field(True, description="rotary positions in the window")
    memory_rope: bool = Field(True, description="rotary positions on the network's q and k as well")
    rope_base: float = Field(500_000.0, gt=1)
    read_scale: bool = Field(False, description="multiply a head's read by silu(w x)")
    norm_eps: float = Field(1e-5, gt=0)
    impl: Literal["auto", "reference", "sdpa"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, n_heads in (("n_heads", self.n_heads), ("n_window_heads", self.window_heads)):
            if self.d_model % n_heads:
                raise ValueError(f"d_model={self.d_model} isn't divisible by {name}={n_heads}; change one")
        if self.window_tokens == 0 and self.n_window_heads is not None:
            raise ValueError(f"n_window_heads={self.n_window_heads} belongs to the softmax, which window=0 leaves out")
        if self.rotates and (self.d_model // self.window_heads) % 2:
            raise ValueError(
                "rope turns pairs: the width of the window's heads must be even, got "
                f"{self.d_model // self.window_heads}; change n_window_heads, or set rope=false and memory_rope=false"
            )
        return self

    @property
    def head_dim(self) -> int:
        """K."""
        return self.d_model // self.n_heads

    @property
    def head_hidden_dim(self) -> int:
        """F, resolved."""
        return self.head_dim if self.hidden_dim is None else self.hidden_dim

    @property
    def window_tokens(self) -> int:
        """Tokens in the window, resolved."""
        return self.chunk_size if self.window is None else self.window

    @property
    def window_heads(self) -> int:
        """Heads of the softmax, resolved."""
        return self.n_heads if self.n_window_heads is None else self.n_window_heads

    @property
    def rotates(self) -> bool:
        """Whether anything is rotated."""
        return self.memory_rope or (self.rope and self.window_tokens > 0)

    @property
    def start_lr(self) -> float:
        """base_lr, resolved."""
        return STEPS_PER_CHUNK / self.chunk_size if self.base_lr is None else self.base_lr


@register("lact")
class LaCT(Mixer):
    """y_t = W_o [softmax attention over a window + norm(f_c(q'_t))], f_c a SwiGLU network as of the chunks before c.

    f(u) = (silu(u W_gate) * (u W_up)) W_down for each head. Window and network share one projection:

        q, k = RMSNorm(W x),  v = W_v x                         the window's; q and k are rotated there
        q', k' = rot(l2norm(silu(a * q + b))),  v' = silu(v)    the network's; q and k have an a and b each

    After the reads of a chunk (apply, then update), with one step size for each token, head and matrix W_i,

        G_i = d/dW_i sum_t eta_i,t f(k'_t) . v'_t,          eta_i,t = softplus(w_i x_t + b_i + softplus^-1(base_lr))
        M_i <- G_i + mean_t sigmoid(w_m x_t + b_m) M_i                  with ``momentum``, else M_i = G_i
        W_i <- columns of (W_i + NewtonSchulz(M_i)) at their initial lengths    with ``muon`` and ``normalise``

    so the loss is the negative dot product of what is read and v'. The gradients are closed forms in torch, and
    training reaches through the updates. norm is RMSNorm over a head, its scale shared by the heads. The network
    sees whole chunks; a window at least a chunk long sees the tokens whose chunk isn't learned yet.

    Shapes: x (B,T,D); q', k', v' (B,T,H,K). State: the three matrices for each sequence and head (and as much
    momentum), which start from learned values, in float32 or float64; the tokens of the unfinished chunk; the last
    window-1 keys and values. That outputs depend on ``chunk_size`` is part of the layer; how the tokens are cut
    into calls changes nothing. A sequence no longer than ``chunk_size`` never reads what it wrote.

    Padding: padded tokens are seen by nobody and teach nothing, and a chunk of padding leaves the network alone;
    their y is zero. They do count as places in a chunk, so left padding shifts the boundaries.

    ``impl``: of the window, as in softmax attention; ``auto`` is torch's fused attention.

    Raises:
        UserError: a mask of the wrong shape or dtype.

    Source: Zhang et al. 2025, "Test-Time Training Done Right", arXiv:2505.23884; its language models have four heads,
    chunks and windows of 2048 tokens. How ours differs: base_lr is 2 / chunk_size, which is its 0.001 at 2048 tokens,
    so that steps of a chunk sum up to the same at any length; Newton-Schulz runs in float32, not bfloat16; momentum
    and ``muon`` are on (there they are options); an unfinished last chunk waits in the state; no low-rank form of the
    initial matrices; projections start normal with variance 1 / fan-in. On MQAR (16 pairs, 350 steps, chunks of 8
    tokens, one seed, learning rate 3e-3) it recalls 0.95, and 0.69 with ``muon=false``.
    """

    Config = LaCTConfig
    traits = Traits(state_growth="config", exact_chunking=False)
    family = "fast weights"
    source = "Zhang et al. 2025, arXiv:2505.23884"
    config: LaCTConfig

    def __init__(self, config: LaCTConfig) -> None:
        super().__init__(config)
        width, n_heads, head_dim, hidden_dim = config.d_model, config.n_heads, config.head_dim, config.head_hidden_dim
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(width, eps=config.norm_eps)
        self.k_norm = RMSNorm(width, eps=config.norm_eps)
        self.qk_scale = nn.Parameter(torch.empty(2, width))
        self.qk_shift = nn.Parameter(torch.empty(2, width))
        self.lr = nn.Linear(width, 3 * n_heads)
        self.keep = nn.Linear(width, n_heads) if config.momentum else None
        self.gate = nn.Parameter(torch.empty(n_heads, head_dim, hidden_dim))
        self.up = nn.Parameter(torch.empty(n_heads, head_dim, hidden_dim))
        self.down = nn.Parameter(torch.empty(n_heads, hidden_dim, head_dim))
        self.read_norm = RMSNorm(head_dim, eps=config.norm_eps)
        self.read_scale = nn.Linear(width, n_heads) if config.read_scale else None
        self.out = nn.Linear(width, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices normal with variance 1 / fan-in, scales one, shifts and biases zero."""
        for part in self.children():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=part.in_features**-0.5)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
            else:
                part.reset_parameters()
        nn.init.ones_(self.qk_scale)
        nn.init.zeros_(self.qk_shift)
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    @property
    def impl(self) -> str:
        return "sdpa" if self.config.impl == "auto" else self.config.impl

    @property
    def state_growth(self) -> str:
        """``window`` with a cache, else ``constant``."""
        return "window" if self.config.window_tokens > 1 else "constant"

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """The initial network is a state, and gates and scales have their own zero point: no weight decay."""
        names = ["gate", "up", "down", "qk_scale", "qk_shift", "lr.bias"]
        names += ["keep.bias"] * (self.keep is not None) + ["read_scale.bias"] * (self.read_scale is not None)
        return {name: ParameterOptions(weight_decay=False) for name in names}

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> LaCTState:
        """The learned initial network for everyone, no momentum, an empty queue and an empty cache."""
        config = self.config
        wide = torch.promote_types(dtype, torch.float32)

        def empty(*shape: int, dtype: torch.dtype = wide) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device, dtype=dtype)

        start = SwiGLUWeights(*(weight.to(device=device, dtype=wide) for weight in (self.gate, self.up, self.down)))
        weights = SwiGLUWeights(*(weight.expand(batch_size, *weight.shape) for weight in start))
        cache = (config.window_heads, 0, config.d_model // config.window_heads)
        position = torch.zeros((), dtype=torch.int64, device=device)
        return LaCTState(
            weights,
            SwiGLUWeights(*(torch.zeros_like(weight) for weight in weights)) if config.momentum else None,
            empty(0, config.n_heads, config.head_dim),
            empty(0, config.n_heads, config.head_dim),
            empty(0, config.n_heads, 3),
            empty(0, config.n_heads) if config.momentum else None,
            empty(0),
            SoftmaxState(empty(*cache, dtype=dtype), empty(*cache, dtype=dtype), None, position),
        )

    def forward(
        self, x: Tensor, state: LaCTState | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        config = self.config
        x = zero_padding(x, mask)
        if state is None:
            state = self.initial_state(x.shape[0], device=x.device, dtype=x.dtype)
        q, k, v = self.q_norm(self.q(x)), self.k_norm(self.k(x)), self.v(x)
        tables = None
        if config.rotates:
            positions = state.window.position + torch.arange(x.shape[1], device=x.device)
            tables = rope_tables(positions, config.d_model // config.window_heads, base=config.rope_base)
        memory_q, queued = self._memory_inputs(x, q, k, v, tables, mask)
        # The network sums up updates of the whole sequence: autocast must not round it to half precision.
        with torch.autocast(x.device.type, enabled=False):
            reads, state = self._read_and_update(memory_q, queued, state, return_state)
        reads = self.read_norm(reads.to(v.dtype))
        if self.read_scale is not None:
            reads = reads * functional.silu(self.read_scale(x)).unsqueeze(-1)
        heads = reads.flatten(2)
        if config.window_tokens:
            near, window = self._window(q, k, v, tables if config.rope else None, mask, state.window)
            heads = heads + near
        else:
            window = state.window._replace(position=state.window.position + x.shape[1])
        y = self.out(heads)
        return MixerOutput(zero_padding(y, mask), state._replace(window=window) if return_state else None, {})

    def _window(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        past: SoftmaxState,
    ) -> tuple[Tensor, SoftmaxState]:
        """Softmax attention (B,T,D) over the window, and its cache after the last token."""
        config = self.config
        q, k, v = (part.unflatten(-1, (config.window_heads, -1)) for part in (q, k, v))
        if tables is not None:
            q, k = rotate(q, tables), rotate(k, tables)
        valid = joined_valid(past, mask, q)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        k, v = torch.cat([past.keys.to(k.dtype), k], dim=2), torch.cat([past.values.to(v.dtype), v], dim=2)
        attend = attend_reference if self.impl == "reference" else attend_sdpa
        y = attend(q, k, v, config.window_tokens, valid).transpose(1, 2).flatten(2)
        first = max(0, k.shape[2] - (config.window_tokens - 1))
        # Copies: views would keep the whole projection, or the tokens before the window, alive.
        keys, values = (part[:, :, first:].clone(memory_format=torch.contiguous_format) for part in (k, v))
        seen = None if valid is None else valid[:, first:].clone()
        return y, SoftmaxState(keys, values, seen, past.position + q.shape[2])

    def _memory_inputs(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The network's q (B,T,H,K), and what of every token goes to the state's queue, by its name there."""
        config = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (part.to(wide) for part in (q, k, v))
        q, k = torch.stack([q, k]) * self.qk_scale.to(wide)[:, None, None] + self.qk_shift.to(wide)[:, None, None]
        if config.silu:
            q, k, v = functional.silu(q), functional.silu(k), functional.silu(v)
        q, k, v = (part.unflatten(-1, (config.n_heads, -1)) for part in (q, k, v))
        q, k = (part / (part.norm(dim=-1, keepdim=True) + UNIT_EPS) for part in (q, k))
        if config.memory_rope and tables is not None:
            # The tables are made for the window's heads; a network's head is cut or put together from them.
            q, k = (
                rotate(part.flatten(2).unflatten(-1, (config.window_heads, -1)), tables).reshape(part.shape)
                for part in (q, k)
            )
        inverse_softplus = math.log(math.expm1(config.start_lr))
        steps = functional.softplus(self.lr(x).to(wide) + inverse_softplus).unflatten(-1, (config.n_heads, 3))
        queued = {
            "k": k,
            "v": v,
            "steps": zero_padding(steps, mask),
            "valid": torch.ones_like(x[..., 0], dtype=wide) if mask is None else mask.to(wide),
        }
        if self.keep is not None:
            queued["keep"] = zero_padding(self.keep(x).to(wide).sigmoid(), mask)
        return q, queued

    def _read_and_update(
        self, q: Tensor, new: dict[str, Tensor], state: LaCTState, return_state: bool
    ) -> tuple[Tensor, LaCTState]:
        """The network's reads (B,T,H,K), and the state after the last token, but for the window's part."""
        n_tokens, chunk_size = q.shape[1], self.config.chunk_size
        reads = [q[:, :0]]
        for start, stop in chunk_spans(state.k.shape[1], n_tokens, chunk_size):
            reads.append(swiglu(q[:, start:stop].transpose(1, 2), state.weights).transpose(1, 2))
            queue = {name: torch.cat([getattr(state, name), part[:, start:stop]], dim=1) for name, part in new.items()}
            state = state._replace(**queue)
            # Nothing reads the update of the call's last chunk, unless the state goes on.
            if state.k.shape[1] == chunk_size and (return_state or stop < n_tokens):
                state = self._updated(state)
        return torch.cat(reads, dim=1), state

    def _updated(self, state: LaCTState) -> LaCTState:
        """The state after the chunk in its queue is learned; the queue is empty."""
        k, v, steps = (part.transpose(1, 2) for part in (state.k, state.v, state.steps))
        activations = swiglu_activations(k, state.weights)
        update = swiglu_gradient(state.weights, k, activations, v, SwiGLUWeights(*steps.split(1, dim=-1)))
        n_valid = state.valid.sum(1)
        any_valid = (n_valid > 0)[:, None, None, None]
        momentum = None
        if state.momentum is not None and state.keep is not None:
            kept = (state.keep.sum(1) / n_valid.clamp_min(1.0)[:, None])[:, :, None, None]
            update = SwiGLUWeights(*(new + kept * old for new, old in zip(update, state.momentum, strict=True)))
            pairs = zip(update, state.momentum, strict=True)
            momentum = SwiGLUWeights(*(torch.where(any_valid, new, old) for new, old in pairs))
        if self.config.muon:
            update = SwiGLUWeights(*(orthogonalised(part) for part in update))
        weights = SwiGLUWeights(*(old + step for old, step in zip(state.weights, update, strict=True)))
        if self.config.normalise:
            start = (self.gate, self.up, self.down)
            weights = SwiGLUWeights(
                *(with_length_of(weight, wanted) for weight, wanted in zip(weights, start, strict=True))
            )
        pairs = zip(weights, state.weights, strict=True)
        weights = SwiGLUWeights(*(torch.where(any_valid, new, old) for new, old in pairs))
        # Copies: slices would keep the finished chunk alive as long as the state.
        queue = (state.k, state.v, state.steps, state.keep, state.valid)
        emptied = (None if part is None else part[:, :0].clone() for part in queue)
        return LaCTState(weights, momentum, *emptied, state.window)

    def flops_per_token(self, context: int) -> float:
        """Projections, one read, and 2 products of the window's width for each key seen; an update, once in a chunk,
        isn't in it."""
        linears = (part for part in self.children() if isinstance(part, nn.Linear))
        weights = sum(part.weight.numel() for part in linears) + sum(
            part.numel() for part in (self.gate, self.up, self.down)
        )
        n_seen = min(context + 1, self.config.window_tokens)
        return 2.0 * weights + 4.0 * self.config.d_model * n_seen
