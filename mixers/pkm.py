"""Static product-key memory: a large trained table, read sparsely. It mixes nothing over time."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mixers.base import Mixer, MixerConfig, MixerOutput, ParameterOptions, State, Traits
from mixers.masking import zero_padding
from mixers.product_keys import read, select
from mixers.registry import register


class ProductKeyMemoryConfig(MixerConfig):
    """Options of :class:`ProductKeyMemory`. The paper: n_subkeys 512, n_heads 4, top_k 32, key and value width 512."""

    n_heads: int = Field(4, gt=0)
    top_k: int = Field(8, gt=0, description="slots read per head")
    n_subkeys: int = Field(32, gt=0, description="sub-keys per half: n*n slots")
    key_dim: int | None = Field(None, gt=0, description="key width K of a head; None: d_model")
    value_dim: int | None = Field(None, gt=0, description="value width V; None: d_model")
    score: Literal["dot", "idw"] = "dot"
    query_norm: Literal["rms", "rms_float32", "batch", "none"] = "rms"
    use_gate: bool = Field(True, description="multiply what was read by silu(Linear(x))")
    value_lr_scale: float = Field(1.0, gt=0, description="learning rate of the value table relative to the others")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.key_dim or self.d_model) % 2:
            raise ValueError(f"the key width must be even to be cut in halves, got {self.key_dim or self.d_model}")
        if self.top_k > self.n_subkeys:
            raise ValueError(f"top_k must be at most n_subkeys={self.n_subkeys}, got {self.top_k}")
        return self


@register("pkm")
class ProductKeyMemory(Mixer):
    """A table of N = n*n trained values, k read per head and token (Lample et al. 2019, arXiv:1907.05242).

        q = RMSNorm(Linear(x)) over the concatenated H*K;  slots, s = k best of N by product keys, per head
        a = softmax(s) per head;  read = sum over heads and slots of a * values[slot]   (one table for all heads)
        y = Linear(read * silu(Linear(x)))                          (the gate: Berges et al. 2024, arXiv:2412.09764)

    No state: every token is read alone, so by itself this layer can recall nothing from the context. ``query_norm``:
    ``rms`` works in the input's precision; ``rms_float32`` rounds to float32 inside, as released, which differs for
    wider inputs only; ``batch`` is Lample's batch normalisation over all tokens of the call. It is the one option
    that breaks the contract, by definition: while training, a token's output depends on the whole batch and later
    tokens, and running averages are written in forward.
    """

    Config = ProductKeyMemoryConfig
    traits = Traits(state_growth="none")
    family = "memory"
    source = "Lample et al. 2019, arXiv:1907.05242"
    default_slot = "memory"
    config: ProductKeyMemoryConfig

    def __init__(self, config: ProductKeyMemoryConfig) -> None:
        super().__init__(config)
        c = config
        self.key_dim, self.value_dim = c.key_dim or c.d_model, c.value_dim or c.d_model
        self.q_proj = nn.Linear(c.d_model, c.n_heads * self.key_dim)
        self.q_norm: nn.Module
        if c.query_norm == "rms":
            self.q_norm = nn.RMSNorm(c.n_heads * self.key_dim, eps=1e-6)
        elif c.query_norm == "rms_float32":
            self.q_norm = _Float32RMSNorm(c.n_heads * self.key_dim, eps=1e-6)
        elif c.query_norm == "batch":
            self.q_norm = _TokenBatchNorm(c.n_heads * self.key_dim)
        else:
            self.q_norm = nn.Identity()
        self.keys = nn.Parameter(torch.empty(c.n_heads, 2, c.n_subkeys, self.key_dim // 2))
        self.values = nn.Parameter(torch.empty(c.n_subkeys**2, self.value_dim))
        if c.use_gate:
            self.gate_proj = nn.Linear(c.d_model, self.value_dim)
        self.out_proj = nn.Linear(self.value_dim, c.d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Keys uniform +-K^-0.5, values normal with std V^-0.5, query Xavier-uniform, others normal std D^-0.5."""
        nn.init.xavier_uniform_(self.q_proj.weight)
        nn.init.zeros_(self.q_proj.bias)
        if not isinstance(self.q_norm, nn.Identity):
            self.q_norm.reset_parameters()
        nn.init.uniform_(self.keys, -(self.key_dim**-0.5), self.key_dim**-0.5)
        nn.init.normal_(self.values, std=self.value_dim**-0.5)
        for linear in (self.out_proj, *((self.gate_proj,) if self.config.use_gate else ())):
            nn.init.normal_(linear.weight, std=self.config.d_model**-0.5)
            nn.init.zeros_(linear.bias)

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """The table is sparsely read: decay would pull unread rows to zero, so it has none."""
        return {
            "keys": ParameterOptions(weight_decay=False),
            "values": ParameterOptions(weight_decay=False, lr_scale=self.config.value_lr_scale),
        }

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        return None

    def forward(
        self, x: Tensor, state: State = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        c = self.config
        n_sequences, n_tokens, _ = x.shape
        x = zero_padding(x, mask)
        q = self.q_norm(self.q_proj(x))
        # Distances and scores need the parameters' precision: narrower ones choose wrong slots.
        with torch.autocast(x.device.type, enabled=False):
            q = q.to(self.keys.dtype).view(1, n_sequences * n_tokens, c.n_heads, self.key_dim)
            selection = select(q, self.keys.unsqueeze(0), c.top_k, c.score)
            weights = torch.softmax(selection.scores, dim=-1)
            rows = read(self.values.unsqueeze(0), selection.slots.flatten(-2), weights.flatten(-2))
        rows = rows.view(n_sequences, n_tokens, self.value_dim).to(x.dtype)
        if c.use_gate:
            rows = rows * nn.functional.silu(self.gate_proj(x))
        return MixerOutput(zero_padding(self.out_proj(rows), mask), None, {})

    def flops_per_token(self, context: int) -> float:
        """Projections 2 D (H K + V + gate V), sub-key scores 2 H n K, read 2 H k V; the same at every context."""
        c = self.config
        projections = 2 * c.d_model * (c.n_heads * self.key_dim + self.value_dim * (2 if c.use_gate else 1))
        scores = 2 * c.n_heads * c.n_subkeys * self.key_dim
        return projections + scores + 2 * c.n_heads * c.top_k * self.value_dim


class _Float32RMSNorm(nn.RMSNorm):
    """x / rms(x) rounded to float32, then scaled in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        narrow = x.float()
        rms = torch.rsqrt(narrow.square().mean(-1, keepdim=True) + self.eps)
        return (narrow * rms).to(x.dtype) * self.weight


class _TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of (B,T,W) over all B*T tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view(x.shape)
