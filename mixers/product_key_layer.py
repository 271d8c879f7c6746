"""What layers that read a trained table through product keys have in common: queries, sub-keys, the choice of slots."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mixers import table_rows
from mixers.base import Mixer, ParameterOptions, State
from mixers.config import MixerConfig
from mixers.product_keys import Score, choose
from mixers.query_norm import QueryNorm, TokenBatchNorm, query_norm


class ProductKeyConfig(MixerConfig):
    """Options that the static product-key layers share."""

    n_heads: int = Field(4, gt=0, description="H, each with queries of its own")
    top_k: int = Field(8, gt=0, description="slots read per head")
    n_subkeys: int = Field(32, gt=0, description="sub-keys per half: n*n slots")
    key_dim: int | None = Field(None, gt=0, description="key width K of a head; None: d_model")
    score: Score = "dot"
    query_norm: QueryNorm = Field("rms", description="over the heads' queries together; batch: see batch_statistics")
    train_keys: bool = Field(True, description="False: the sub-keys stay as drawn")
    value_lr_scale: float = Field(1.0, gt=0, description="learning rate of the table relative to the others")
    impl: table_rows.Impl = Field("auto", description="of the table's reads; auto: triton on CUDA, else sparse")

    @model_validator(mode="after")
    def _check_product_keys(self) -> Self:
        if self.head_key_dim % 2:
            raise ValueError(f"the key width must be even to be cut in halves, got {self.head_key_dim}")
        if self.top_k > self.n_subkeys:
            raise ValueError(f"top_k must be at most n_subkeys={self.n_subkeys}, got {self.top_k}")
        return self

    @property
    def head_key_dim(self) -> int:
        """K, resolved."""
        return self.d_model if self.key_dim is None else self.key_dim


class ProductKeyLayer(Mixer):
    """A layer without a state that reads a table of N = n*n rows: here its queries and keys.

        q = norm(Linear(x)) over the concatenated H*K;  slots, s = k best of N by product keys, per head

    ``query_norm``: see :mod:`mixers.query_norm`. With ``batch``, a token's output in training depends on all tokens of
    the call, those of other sequences and later ones included, and running averages are written in forward: that is
    what ``batch_statistics`` declares. In evaluation each token is read alone, as with the others.

    Sub-classes name their table's parameters in ``table_names``.
    """

    table_names: tuple[str, ...] = ("values",)
    config: ProductKeyConfig

    def __init__(self, config: ProductKeyConfig, n_key_heads: int) -> None:
        """``n_key_heads``: sets of sub-keys, one per head or 1 for all of them."""
        super().__init__(config)
        width = config.n_heads * config.head_key_dim
        self.q_proj = nn.Linear(config.d_model, width)
        self.q_norm = query_norm(config.query_norm, width)
        keys = torch.empty(n_key_heads, 2, config.n_subkeys, config.head_key_dim // 2)
        # What isn't trained is a buffer: saved and moved with the layer, unknown to the optimiser.
        if config.train_keys:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Keys uniform +-K^-0.5, query projection Xavier-uniform; the table is the sub-class's."""
        nn.init.xavier_uniform_(self.q_proj.weight)
        nn.init.zeros_(self.q_proj.bias)
        if not isinstance(self.q_norm, nn.Identity):
            self.q_norm.reset_parameters()
        nn.init.uniform_(self.keys, -(self.config.head_key_dim**-0.5), self.config.head_key_dim**-0.5)

    @property
    def impl(self) -> str:
        return table_rows.resolve(self.config.impl, getattr(self, self.table_names[0]), self.name)

    @property
    def batch_statistics(self) -> tuple[str, ...]:
        """The running averages of ``query_norm='batch'``."""
        return ("q_norm.running_mean", "q_norm.running_var") if self.config.query_norm == "batch" else ()

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """The table is sparsely read: decay would pull unread rows to zero, so it has none."""
        tables = ParameterOptions(weight_decay=False, lr_scale=self.config.value_lr_scale)
        keys = {"keys": ParameterOptions(weight_decay=False)} if self.config.train_keys else {}
        return {**keys, **dict.fromkeys(self.table_names, tables)}

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        return None

    def _choose(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """slots and scores (S,H,k), best first, of all tokens (B,T,D) as S = B*T queries."""
        c = self.config
        q = self.q_proj(x)
        q = self.q_norm(q, mask) if isinstance(self.q_norm, TokenBatchNorm) else self.q_norm(q)
        # Distances and scores need the parameters' precision: narrower ones choose wrong slots.
        with torch.autocast(x.device.type, enabled=False):
            q = q.to(self.keys.dtype).reshape(1, -1, c.n_heads, c.head_key_dim)
            keys = self.keys.expand(c.n_heads, -1, -1, -1).unsqueeze(0)
            slots, scores = choose(q, keys, c.top_k, c.score)
            return slots[0], scores[0]

    def active_rows(self) -> dict[str, int]:
        """k rows for each head, of every table: H k, at most all N."""
        c = self.config
        return dict.fromkeys(self.table_names, min(c.n_heads * c.top_k, c.n_subkeys**2))

    def _choose_flops(self) -> float:
        """Queries 2 D H K, sub-key scores 2 H n K."""
        c = self.config
        return float(2 * c.n_heads * c.head_key_dim * (c.d_model + c.n_subkeys))
