"""A whole model's training step, with and without the memory: the paper's twelve layers of gated DeltaNet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from experiments.backbone import Backbone
from experiments.bench.case import Case
from experiments.bench.operations import Operation
from experiments.config import ModelConfig
from experiments.device import Compute

WITHOUT = "without"
MEMORY_LAYERS = "2,6,10"


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the model and its memories; V is both the key and the value width."""

    d_model: int
    mlp_width: int
    vocab_size: int
    n_heads: int
    n: int
    value_dim: int
    chunk: int
    batch: int
    tokens: int


SIZES = {
    "small": ModelSize(128, 384, 1024, 2, 64, 128, 64, 4, 512),
    "paper": ModelSize(768, 2304, 32_000, 8, 512, 512, 512, 8, 4096),
}


def pattern_of(case: Case, size: ModelSize) -> str:
    """Gated DeltaNet in every layer, the memory (K = V) before layers 2, 6 and 10."""
    token = f"gated_deltanet(n_heads={size.n_heads},key_dim=64)"
    if case.impl == WITHOUT:
        return token
    options = {
        "chunk_size": case.chunk, "impl": case.impl, "key_dim": case.key_dim, "n_subkeys": case.n,
        "scope": case.scope, "top_k": case.top_k, "value_dim": case.value_dim,
    }  # fmt: skip
    return f"{token} | fwpkm({','.join(f'{key}={value}' for key, value in options.items())})@{MEMORY_LAYERS}"


def training_step(case: Case, size: ModelSize) -> Operation:
    """Forward, loss on the next token, backward and AdamW; bfloat16 autocast on CUDA, as in training."""
    device = torch.device(case.device)
    compute = Compute(device, torch.bfloat16 if device.type == "cuda" else None)
    config = ModelConfig(
        pattern=pattern_of(case, size), d_model=size.d_model, n_layers=12, mlp="swiglu", mlp_width=size.mlp_width
    )
    with torch.random.fork_rng():
        torch.manual_seed(case.seed)
        model = Backbone(config, size.vocab_size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    generator = torch.Generator(case.device).manual_seed(case.seed)
    shape = (case.batch, case.tokens + 1)
    tokens = torch.randint(size.vocab_size, shape, generator=generator, device=case.device)

    def step() -> None:
        optimizer.zero_grad()
        with compute.autocast():
            logits = model.logits(model(tokens[:, :-1]).hidden)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()

    return step
