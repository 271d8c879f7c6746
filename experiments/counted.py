"""Costs of a model that are known before anything is trained: the same numbers that a run records under ``cost/``."""

from __future__ import annotations

import contextlib
import functools
import statistics
import typing
from dataclasses import dataclass, replace
from typing import Literal

import torch

from experiments.backbone import Backbone, Block, build_mixer, layer_plan
from experiments.config import ExperimentConfig, ModelConfig, StateConfig
from experiments.cost import cost_contexts
from experiments.errors import UserError
from experiments.pattern import MixerSpec, parse_pattern
from experiments.run import longest_report_sample
from experiments.tasks import build_task
from experiments.tasks.base import TaskConfig
from mixers import registry
from mixers.base import Mixer, Slot, state_bytes

Quantity = Literal["parameters", "state_bytes", "flops_per_token"]
# Up to so many multiply-adds a state is made by computing; a larger one from shapes alone, which takes a fixed time per
# operation that is longer than that of a small computation.
MAX_COMPUTED = 2e8


@dataclass(frozen=True)
class CountedCost:
    """A quantity of the whole model, as recorded, and the part of it that the mixers have."""

    total: float
    mixers: float


def counted_cost(config: ExperimentConfig, quantity: Quantity) -> CountedCost:
    """``quantity`` of the model of ``config`` at the length at which a run measures costs.

    Parameters and FLOPs are those of the model built without memory; state bytes are those of real states, layer by
    layer, after T-1 or T tokens, whichever are more. ``train.precision = "auto"`` counts as float32 here: a plan must
    not depend on the machine that makes it.

    Raises:
        UserError: the model can't be built, or a mixer does not know its FLOPs or keeps no state of its past.
    """
    task_seed = config.seed_for("data")
    vocab_size, n_tokens = _sizes(config.task, task_seed, config.train.eval_batch_size)
    if quantity == "state_bytes":
        return _state(config.model, config.state.scope, n_tokens, config.train.precision == "bf16")
    return _slow(config.model, config.state, vocab_size, n_tokens, quantity)


@functools.lru_cache(maxsize=1024)
def _sizes(config: TaskConfig, data_seed: int, batch_size: int) -> tuple[int, int]:
    task = build_task(config, data_seed)
    return task.vocab_size, longest_report_sample(task, batch_size)


@functools.lru_cache(maxsize=4096)
def _slow(config: ModelConfig, state: StateConfig, vocab_size: int, n_tokens: int, quantity: Quantity) -> CountedCost:
    with torch.device("meta"):
        model = Backbone(config, vocab_size, state)
    mixers = model.named_mixers()
    if quantity == "parameters":
        return CountedCost(_n_trained(model), sum(_n_trained(mixer) for mixer in mixers.values()))
    total, of_mixers = [], []
    for context in cost_contexts(n_tokens):
        parts = {place: mixer.flops_per_token(context) for place, mixer in mixers.items()}
        if unknown := next((place for place, flops in parts.items() if flops is None), None):
            raise UserError(f"pattern {config.pattern!r}: {mixers[unknown].name} does not know its FLOPs")
        total.append(model.flops_per_token(context))
        of_mixers.append(sum(parts.values()))
    return CountedCost(statistics.fmean(total), statistics.fmean(of_mixers))


def _n_trained(module: torch.nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad))


@functools.lru_cache(maxsize=4096)
def _state(config: ModelConfig, scope: str | None, n_tokens: int, bf16: bool) -> CountedCost:
    found = [
        _layer_state(config.model_copy(update={"pattern": "", "n_layers": 1}), tuple(layer.items()), scope, n, bf16)
        for layer in layer_plan(parse_pattern(config.pattern), config)
        for n in (n_tokens - 1, n_tokens)
    ]
    before, full = found[0::2], found[1::2]
    return CountedCost(
        max(sum(cost.total for cost in costs) for costs in (before, full)),
        max(sum(cost.mixers for cost in costs) for costs in (before, full)),
    )


@functools.lru_cache(maxsize=4096)
@torch.no_grad()
def _layer_state(
    config: ModelConfig, layer: tuple[tuple[Slot, MixerSpec], ...], scope: str | None, n_tokens: int, bf16: bool
) -> CountedCost:
    """State of one layer after ``n_tokens`` tokens. The pattern in ``config`` is not read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        sizes = Block(config, {slot: build_mixer(spec, config.d_model, scope) for slot, spec in layer})
    for module in sizes.sublayers.values():
        if isinstance(module, Mixer) and not module.traits.resumable:
            raise UserError(f"{module.name} keeps no state of its past that could be counted")
    large = n_tokens * max(_n_trained(sizes), config.d_model) > MAX_COMPUTED
    with torch.random.fork_rng(devices=[]), FakeTensorMode() if large else contextlib.nullcontext():
        return _measured(config, layer, scope, n_tokens, bf16)


def _measured(
    config: ModelConfig, layer: tuple[tuple[Slot, MixerSpec], ...], scope: str | None, n_tokens: int, bf16: bool
) -> CountedCost:
    mixers = {slot: build_mixer(_readable(spec), config.d_model, scope) for slot, spec in layer}
    block = Block(config, mixers).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        _, state, _ = block(torch.zeros(1, n_tokens, config.d_model), None, True, None)
    own = sum(state_bytes(part) for name, part in state.items() if name in mixers)
    return CountedCost(float(state_bytes(state)), float(own))


def _readable(spec: MixerSpec) -> MixerSpec:
    """The same mixer by its readable path: its state is the whole one, which runs count whatever they store of it."""
    field = registry.get(spec.name).Config.model_fields.get("impl")
    if field is None or "reference" not in typing.get_args(field.annotation):
        return spec
    return replace(spec, options=tuple(sorted({**dict(spec.options), "impl": "reference"}.items())))
