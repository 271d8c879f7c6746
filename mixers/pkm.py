"""Static product-key memory: a large trained table, read sparsely. It mixes nothing over time."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mixers.base import MixerOutput, State, Traits
from mixers.masking import zero_padding
from mixers.product_key_layer import ProductKeyConfig, ProductKeyLayer
from mixers.registry import register
from mixers.table_rows import sum_rows


class ProductKeyMemoryConfig(ProductKeyConfig):
    """Options of :class:`ProductKeyMemory`. The paper: n_subkeys 512, n_heads 4, top_k 32, key and value width 512."""

    value_dim: int | None = Field(None, gt=0, description="value width V; None: d_model")
    use_gate: bool = Field(True, description="multiply what was read by silu(Linear(x))")


@register("pkm")
class ProductKeyMemory(ProductKeyLayer):
    """A table of N = n*n trained values, k read per head and token (Lample et al. 2019, arXiv:1907.05242).

        q = norm(Linear(x)) over the concatenated H*K;  slots, s = k best of N by product keys, per head
        a = softmax(s) per head;  read = sum over heads and slots of a * values[slot]   (one table for all heads)
        y = Linear(read * silu(Linear(x)))                          (the gate: Berges et al. 2024, arXiv:2412.09764)

    No state: every token is read alone, so by itself this layer can recall nothing from the context. The paper
    normalises queries over the batch (``query_norm='batch'``, see :class:`ProductKeyLayer`), has no gate, and trains
    the table faster than the rest (``value_lr_scale``); our defaults are RMSNorm, the gate and one learning rate.
    """

    Config = ProductKeyMemoryConfig
    traits = Traits(state_growth="none")
    family = "memory"
    source = "Lample et al. 2019, arXiv:1907.05242"
    default_slot = "memory"
    config: ProductKeyMemoryConfig

    def __init__(self, config: ProductKeyMemoryConfig) -> None:
        super().__init__(config, n_key_heads=config.n_heads)
        self.value_dim = config.value_dim or config.d_model
        self.values = nn.Parameter(torch.empty(config.n_subkeys**2, self.value_dim))
        if config.use_gate:
            self.gate_proj = nn.Linear(config.d_model, self.value_dim)
        self.out_proj = nn.Linear(self.value_dim, config.d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Keys uniform +-K^-0.5, values normal with std V^-0.5, query Xavier-uniform, others normal std D^-0.5."""
        super().reset_parameters()
        nn.init.normal_(self.values, std=self.value_dim**-0.5)
        for linear in (self.out_proj, *((self.gate_proj,) if self.config.use_gate else ())):
            nn.init.normal_(linear.weight, std=self.config.d_model**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, state: State = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        x = zero_padding(x, mask)
        slots, scores = self._choose(x, mask)
        with torch.autocast(x.device.type, enabled=False):
            weights = torch.softmax(scores, dim=-1)
            rows = sum_rows(self.values, slots.flatten(-2), weights.flatten(-2), self.impl)
        rows = rows.view(*x.shape[:2], self.value_dim).to(x.dtype)
        if self.config.use_gate:
            rows = rows * nn.functional.silu(self.gate_proj(x))
        return MixerOutput(zero_padding(self.out_proj(rows), mask), None, {})

    def flops_per_token(self, context: int) -> float:
        """Queries and scores 2 H K (D + n), projections 2 D (V + gate V), read 2 H k V; the same at every context."""
        c = self.config
        projections = 2 * c.d_model * self.value_dim * (2 if c.use_gate else 1)
        return self._choose_flops() + projections + 2 * c.n_heads * c.top_k * self.value_dim
