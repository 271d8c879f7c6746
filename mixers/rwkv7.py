"""RWKV-7: the generalised delta rule, with vectors for decay and in-context learning rate."""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mixers.base import Mixer, MixerOutput, ParameterOptions, Traits
from mixers.config import MixerConfig
from mixers.delta_heads import unit_length
from mixers.delta_rule import unsupported_by_fla
from mixers.dplr import DPLROutput, dplr_chunked, dplr_recurrent
from mixers.implementations import require_fla, resolve_fla
from mixers.masking import zero_padding
from mixers.registry import register

# The strongest log decay of a token, -exp(-1/2): a channel keeps at least 0.545 of what it held.
MIN_LOG_DECAY = -0.6065306597126334
# Exponents p of the token shift's start values 1 - (i/D)^p, for r, w, k, v, a, g in this order.
SHIFT_EXPONENTS = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)


class RWKV7State(NamedTuple):
    """last (B,D), the last input, zeros at the start; memory (B,H,K,V), at least float32."""

    last: Tensor
    memory: Tensor


class RWKV7Config(MixerConfig):
    """Options of RWKV-7's time mixing. Heads are d_model / n_heads wide."""

    n_heads: int = Field(1, gt=0, description="H")
    decay_rank: int = Field(32, gt=0, description="inner width of the decay's projections")
    rate_rank: int = Field(32, gt=0, description="inner width of the in-context learning rate's projections")
    gate_rank: int = Field(32, gt=0, description="inner width of the output gate's projections")
    norm_eps: float = Field(1e-5, gt=0, description="times the head width: eps of the norm over a head")
    chunk_size: int = Field(32, gt=0, description="tokens solved as one triangular system; changes speed only")
    impl: Literal["auto", "reference", "fla"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} isn't divisible by n_heads={self.n_heads}; change one")
        return self

    @property
    def head_dim(self) -> int:
        """K and V."""
        return self.d_model // self.n_heads


class LowRank(nn.Module):
    """y = out(act(down(x))), from D to D by a narrow middle; only ``out`` may have a bias."""

    def __init__(self, dim: int, rank: int, activation: Literal["none", "sigmoid", "tanh"], *, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(dim, rank, bias=False)
        self.out = nn.Linear(rank, dim, bias=bias)

    def reset_weights(self, out_scale: float) -> None:
        """Normal with variance 1 / fan-in, ``out`` times ``out_scale``. Its bias is the caller's."""
        nn.init.normal_(self.down.weight, std=self.down.in_features**-0.5)
        nn.init.normal_(self.out.weight, std=out_scale * self.out.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.down(x)
        if self.activation == "tanh":
            inner = inner.tanh()
        elif self.activation == "sigmoid":
            inner = inner.sigmoid()
        return self.out(inner)


@register("rwkv7")
class RWKV7(Mixer):
    """S_t = S_{t-1} (diag(w_t) - c_t^T (a_t * c_t)) + v_t^T k_t,
    y_t = W_o [g_t * (norm(r_t S_t^T) + (r_t * rho * k_t summed) v_t)], all vectors rows, one S for a head.

    Token shift: x^z_t = x_t + m_z * (x_{t-1} - x_t) with a learned m_z for each z of r, w, k, v, a, g.
    r, k', v = W x^r, W x^k, W x^v;  log w = -exp(-1/2) sigmoid(D_2 tanh(D_1 x^w) + d), the decay;
    a = sigmoid(A_2 A_1 x^a + b), the in-context learning rate;  g = G_2 sigmoid(G_1 x^g);
    c = l2norm(xi * k'), the key that is removed;  k = k' * (1 + alpha * (a - 1)), the key that is written.
    norm is a layer norm over each head with weight and bias of its own; rho (H,K), xi and alpha (D) are learned.

    Shapes: x (B,T,D); r, w, k, v, a, c (B,T,H,K) with K = V = D / H. The state is S, kept transposed (B,H,K,V), in
    float32 or float64, and the last input (B,D).

    Padding: padded tokens write nothing, forget nothing, count as zeros in the token shift, and their y is zero.

    ``impl``: ``reference`` solves chunks of tokens as triangular systems, and a single token by the rule itself;
    ``fla`` calls flash-linear-attention's Triton kernels on CUDA, which take half precision only. ``auto`` takes fla
    on CUDA where it is installed and K is at most 256, in half precision or under autocast.

    Raises:
        UserError: ``fla`` is asked for and can't run here; a mask of the wrong shape or dtype.

    Source: Peng et al., arXiv:2503.14456. Ours is a single layer: no residual of the first layer's values, start
    values as for the first of many, but for the norm's scale, which is one and not (1 / layers)^0.7. Ranks are 32
    whatever the width, where they grow with its root (32 at least); projections start normal with variance
    1 / fan-in (a hundredth of that for k, as in the paper, and for the second ones of decay and rate) instead of
    orthogonal or zero; the l2norm adds 1e-6 under the root.
    """

    Config = RWKV7Config
    traits = Traits(state_growth="constant")
    family = "delta rule"
    source = "arXiv:2503.14456"
    config: RWKV7Config

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        if config.impl == "fla":
            require_fla("mixer 'rwkv7'")
        dim = config.d_model
        self.shift = nn.Parameter(torch.empty(6, dim))  # m of r, w, k, v, a, g
        self.r = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.decay = LowRank(dim, config.decay_rank, "tanh", bias=True)
        self.rate = LowRank(dim, config.rate_rank, "none", bias=True)
        self.gate = LowRank(dim, config.gate_rank, "sigmoid", bias=False)
        self.removal_scale = nn.Parameter(torch.empty(dim))  # xi
        self.write_rate = nn.Parameter(torch.empty(dim))  # alpha
        self.bonus = nn.Parameter(torch.empty(config.n_heads, config.head_dim))  # rho
        self.norm = nn.GroupNorm(config.n_heads, dim, eps=config.head_dim * config.norm_eps)
        self.out = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's start values of a first layer, except that no projection starts at zero."""
        config = self.config
        channel = torch.arange(config.d_model, dtype=self.shift.dtype, device=self.shift.device)
        ramp = channel / max(config.d_model - 1, 1)  # 0 ... 1 over the channels
        within = 2 * (channel % config.head_dim) / max(config.head_dim - 1, 1) - 1  # -1 ... 1 over a head
        zigzag = within * within.abs()
        for row, exponent in zip(self.shift, SHIFT_EXPONENTS, strict=True):
            row.copy_(1 - (channel / config.d_model) ** exponent)
        for linear in (self.r, self.k, self.v, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.k.weight.mul_(0.1)
        self.decay.reset_weights(0.1)
        self.decay.out.bias.copy_(6 * ramp - 5.5 + 2.5 * zigzag)
        self.rate.reset_weights(0.1)
        self.rate.out.bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * (ramp - 0.5))
        self.gate.reset_weights(1.0)
        self.removal_scale.copy_(0.71 - 0.1 * (ramp - 0.5))
        self.write_rate.fill_(1.02)
        self.bonus.fill_(-0.04)
        self.norm.reset_parameters()

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """Vectors with a scale of their own: weight decay would drag them to another one."""
        names = ("shift", "removal_scale", "write_rate", "bonus", "decay.out.bias", "rate.out.bias", "norm.weight")
        return {name: ParameterOptions(weight_decay=False) for name in names}

    @property
    def impl(self) -> str:
        weight = self.out.weight
        unsupported = unsupported_by_fla(weight.dtype, self.config.head_dim)
        if weight.dtype == torch.float32 and not torch.is_autocast_enabled(weight.device.type):
            unsupported = "float32 outside autocast"
        return resolve_fla(self.config.impl, weight.device, "mixer 'rwkv7'", unsupported)

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> RWKV7State:
        config = self.config
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch_size, config.n_heads, config.head_dim, config.head_dim)
        last = torch.zeros(batch_size, config.d_model, device=device, dtype=dtype)
        return RWKV7State(last, torch.zeros(shape, device=device, dtype=wide))

    def forward(
        self, x: Tensor, state: RWKV7State | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        config, impl = self.config, self.impl
        x = zero_padding(x, mask)
        if state is None:
            state = self.initial_state(x.shape[0], device=x.device, dtype=x.dtype)
        inputs = torch.cat([state.last.to(x.dtype).unsqueeze(1), x], dim=1)
        step_back = inputs[:, :-1] - x
        x_r, x_w, x_k, x_v, x_a, x_g = (x + mix * step_back for mix in self.shift.to(x.dtype))

        wide = torch.promote_types(x.dtype, torch.float32)
        log_decay = MIN_LOG_DECAY * self.decay(x_w).to(wide).sigmoid()
        rate = self.rate(x_a).sigmoid()
        key = self.k(x_k)
        write_key = key * (1 + self.write_rate.to(key.dtype) * (rate - 1))
        removal_key = unit_length((key * self.removal_scale.to(key.dtype)).unflatten(-1, (config.n_heads, -1)))
        r, k, v, rate, log_decay = (
            part.unflatten(-1, (config.n_heads, -1)) for part in (self.r(x_r), write_key, self.v(x_v), rate, log_decay)
        )
        if impl == "fla" and x.shape[1] > 0:
            core = _fla(r, log_decay, k, v, removal_key, rate, state.memory, mask)
        else:
            core = rwkv7_reference(
                r, log_decay, k, v, removal_key, rate, state.memory, mask, chunk_size=config.chunk_size
            )
        heads = self._normalised(core.y.to(wide)) + (r * self.bonus.to(r.dtype) * k).sum(-1, keepdim=True) * v
        y = zero_padding(self.out(heads.flatten(2).to(v.dtype) * self.gate(x_g)), mask)
        # A copy: a view would keep all of the inputs alive as long as the state.
        return MixerOutput(y, RWKV7State(inputs[:, -1].clone(), core.state) if return_state else None, {})

    def _normalised(self, heads: Tensor) -> Tensor:
        """Layer norm of each head, (B,T,H,V), with weight and bias for every channel of every head."""
        norm = self.norm
        unit = functional.layer_norm(heads, heads.shape[-1:], eps=norm.eps)
        weight, bias = (part.to(heads.dtype).view(heads.shape[2:]) for part in (norm.weight, norm.bias))
        return unit * weight + bias

    def flops_per_token(self, context: int) -> float:
        """Projections, and four products of K x V for each head: what the removed key holds, the removal, the write,
        the read. Free of the context."""
        config = self.config
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        projections = 2 * sum(linear.weight.numel() for linear in linears)
        return float(projections + 8 * config.n_heads * config.head_dim**2)


def rwkv7_reference(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    removal_key: Tensor,
    rate: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    chunk_size: int = 32,
) -> DPLROutput:
    """The rule as diagonal plus low rank: a = -c reads what the state holds, b = rate * c takes that much away.

    Shapes: r, log_decay <= 0, k, removal_key c and rate (B,T,H,K), v (B,T,H,V), state (B,H,K,V) -> y (B,T,H,V) and
    the state. A single token goes by the recurrence, several by chunks.
    """
    inputs = (r, -removal_key, rate * removal_key, v, log_decay, state, mask)
    if r.shape[1] == 1:
        return dplr_recurrent(*inputs, k=k)
    return dplr_chunked(*inputs, k=k, chunk_size=chunk_size)


def _fla(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    removal_key: Tensor,
    rate: Tensor,
    state: Tensor,
    mask: Tensor | None,
) -> DPLROutput:
    """The same on CUDA; the kernels keep the state in float32."""
    from fla.ops.rwkv7 import chunk_rwkv7, fused_mul_recurrent_rwkv7

    log_decay, k, rate = (zero_padding(part, mask) for part in (log_decay, k, rate))
    common = {"scale": 1.0, "initial_state": state, "output_final_state": True}
    # The recurrent kernel has no backward: it serves decoding only.
    if r.shape[1] == 1 and not torch.is_grad_enabled():
        y, new_state = fused_mul_recurrent_rwkv7(r, log_decay, k, v, removal_key, rate, **common)
    else:
        y, new_state = chunk_rwkv7(r, log_decay, k, v, -removal_key, rate * removal_key, **common)
    return DPLROutput(y, new_state)
