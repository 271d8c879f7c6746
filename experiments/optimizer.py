"""AdamW with parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from experiments.backbone import Backbone
from experiments.config import TrainConfig
from mixers.base import Mixer, ParameterOptions


def build_optimizer(model: Backbone, config: TrainConfig) -> torch.optim.AdamW:
    """Groups by (weight decay or not, learning-rate scale).

    No decay on vectors (norm scales, biases, decay rates), on embeddings, nor where a mixer says so: memories.
    Each group keeps its ``lr_scale``; :func:`set_lr` applies it.
    """
    groups: dict[ParameterOptions, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(parameter_options(model, name, parameter), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if options.weight_decay else 0.0,
                "lr_scale": options.lr_scale,
            }
            for options, parameters in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )


def parameter_options(model: Backbone, name: str, parameter: nn.Parameter) -> ParameterOptions:
    """A mixer's word on its own parameter, else the general rule."""
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        owner = model.get_submodule(".".join(path[:depth]))
        if isinstance(owner, Mixer):
            given = owner.parameter_options().get(".".join(path[depth:]))
            if given is not None:
                return given
    is_embedding = isinstance(model.get_submodule(".".join(path[:-1])), nn.Embedding)
    return ParameterOptions(weight_decay=parameter.ndim > 1 and not is_embedding)


def lr_at(step: int, n_steps: int, config: TrainConfig) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then constant or a cosine to lr * min_lr_ratio."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(n_steps - config.warmup_steps, 1)
    low = config.lr * config.min_lr_ratio
    return low + 0.5 * (config.lr - low) * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_lr(optimizer: torch.optim.AdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
