"""PEER: a feed-forward layer whose hidden neurons are chosen per token out of very many, by product keys."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mixers.base import MixerOutput, State, Traits
from mixers.masking import zero_padding
from mixers.product_key_layer import ProductKeyConfig, ProductKeyLayer
from mixers.registry import register
from mixers.table_rows import dot_rows, sum_rows

ACTIVATIONS = {"gelu": functional.gelu, "relu": functional.relu, "silu": functional.silu}


class PEERConfig(ProductKeyConfig):
    """Options of :class:`PEER`. The paper: n_subkeys 1024, n_heads 8, top_k 16, query_norm batch."""

    activation: Literal["gelu", "relu", "silu"] = "gelu"
    expert_weights: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="of a head's k scores: softmax sums to one per head, sigmoid takes each score alone"
    )
    shared_keys: bool = Field(True, description="one set of sub-keys for all heads; False: one per head")


@register("peer")
class PEER(ProductKeyLayer):
    """N = n*n experts of a single neuron each, k used per head and token.

        q = norm(Linear(x)) over the concatenated H*K;  experts i, s_i = k best of N by product keys, per head
        e_i(x) = act(u_i . x) v_i;   y = sum over heads and their experts of g_i e_i(x),  g = softmax(s) or sigmoid(s)

    Shapes: x (B,T,D); the experts' tables ``experts_in`` u and ``experts_out`` v (N,D), shared by the heads; keys
    (1 or H,2,n,K/2). Parameters grow with N, the FLOPs of a token with sqrt(N) only. An expert that two heads choose
    counts twice. The chosen rows, B T H k D numbers, are formed by ``impl='reference'`` only (those of u).

    No state: every token is served alone, as in an MLP, whose place this layer takes.

    Source: He, Mixture of A Million Experts, 2024, arXiv:2407.04153. There queries are normalised over the batch: that
    is ``query_norm='batch'``, see :class:`ProductKeyLayer`; our default is RMSNorm, which keeps training causal. The
    heads share one set of sub-keys as there; ``shared_keys=false`` gives each its own, as in PKM. Both tables start
    normal with std D^-0.5, so that u . x has variance 1 for inputs of variance 1.
    """

    Config = PEERConfig
    traits = Traits(state_growth="none")
    family = "memory"
    source = "He 2024, arXiv:2407.04153"
    default_slot = "channel"
    table_names = ("experts_in", "experts_out")
    config: PEERConfig

    def __init__(self, config: PEERConfig) -> None:
        super().__init__(config, n_key_heads=1 if config.shared_keys else config.n_heads)
        self.experts_in = nn.Parameter(torch.empty(config.n_subkeys**2, config.d_model))
        self.experts_out = nn.Parameter(torch.empty(config.n_subkeys**2, config.d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Both tables normal with std D^-0.5, keys uniform +-K^-0.5, query projection Xavier-uniform."""
        super().reset_parameters()
        for table in (self.experts_in, self.experts_out):
            nn.init.normal_(table, std=self.config.d_model**-0.5)

    def forward(
        self, x: Tensor, state: State = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        x = zero_padding(x, mask)
        slots, scores = self._choose(x, mask)
        experts = slots.flatten(-2)
        with torch.autocast(x.device.type, enabled=False):
            weights = scores.softmax(dim=-1) if self.config.expert_weights == "softmax" else scores.sigmoid()
            inputs = x.to(self.experts_in.dtype).reshape(-1, x.shape[-1])
            hidden = ACTIVATIONS[self.config.activation](dot_rows(self.experts_in, experts, inputs, self.impl))
            y = sum_rows(self.experts_out, experts, weights.flatten(-2) * hidden, self.impl)
        return MixerOutput(zero_padding(y.view(x.shape).to(x.dtype), mask), None, {})

    def flops_per_token(self, context: int) -> float:
        """Queries and scores 2 H K (D + n), both halves of H k experts 4 H k D; the same at every context."""
        c = self.config
        return self._choose_flops() + 4 * c.n_heads * c.top_k * c.d_model
