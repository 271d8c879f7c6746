"""The layers that are measured, and the three things that are done with one: prefill, decoding, training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.device import Compute
from experiments.errors import UserError
from experiments.pattern import MixerSpec, parse_pattern
from mixers import registry
from mixers.base import Mixer, State

HEAD_WIDTH = 64
Operation = Callable[[], object]


class Measured(NamedTuple):
    """A layer under its label; ``options`` are all that it was built with, besides its defaults."""

    label: str
    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One thing that is measured: ``prefill`` of, ``decode`` after, or ``train`` on that many tokens."""

    label: str
    scene: str
    tokens: int
    batch: int = 1


def parse_layers(texts: tuple[str, ...], d_model: int, common: dict[str, Any], device: str) -> list[Measured]:
    """The layers named as in patterns, ``softmax(window=64)``; none: all registered that run on ``device``.

    ``common`` options go to all of them. Unless given, token mixers have heads of 64 channels.

    Raises:
        UserError: no such mixer or option; not a single mixer; named twice; not for this device.
    """
    specs = [_one(text) for text in texts] or [MixerSpec(name) for name in registry.names()]
    found = []
    for spec in specs:
        cls = registry.get(spec.name)
        if device not in cls.traits.devices:
            if texts:
                raise UserError(f"bench: {spec.name} runs on {', '.join(cls.traits.devices)} only; give --device")
            continue
        options = {"d_model": d_model} | _usual_heads(cls, d_model) | common | dict(spec.options)
        cls.Config.parse(options, f"bench: {spec.name}")
        found.append(Measured(str(spec), spec.name, options))
    if twice := {layer.label for layer in found if [other.label for other in found].count(layer.label) > 1}:
        raise UserError(f"bench: {', '.join(sorted(twice))}: named twice")
    return found


def _one(text: str) -> MixerSpec:
    if text.startswith("fla:"):
        return MixerSpec(text)
    pattern = parse_pattern(text)
    if len(pattern.token) != 1 or pattern.placements or pattern.token[0] is None:
        raise UserError(f"bench: {text!r}: give mixers one by one, each with its options: 'softmax(window=64)' fwpkm")
    return pattern.token[0]


def _usual_heads(cls: type[Mixer], d_model: int) -> dict[str, int]:
    fields = cls.Config.model_fields
    if cls.default_slot != "token" or "n_heads" not in fields or d_model % HEAD_WIDTH:
        return {}
    return {"n_heads": d_model // HEAD_WIDTH}


@functools.lru_cache(maxsize=4)
def _drawn(device: str, seed: int, batch: int, n_tokens: int, d_model: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(batch, n_tokens, d_model, generator=generator, device=device)


class Bench:
    """One layer in evaluation, on its device, with the same inputs as all others of this width and seed."""

    def __init__(self, measured: Measured, compute: Compute, seed: int) -> None:
        self.measured, self.compute, self.seed = measured, compute, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = registry.build(measured.name, measured.options).eval().to(compute.device)

    def inputs(self, batch: int, n_tokens: int) -> Tensor:
        """(B,T,D), normal, the same for all layers of this width."""
        return _drawn(str(self.compute.device), self.seed, batch, n_tokens, self.layer.config.d_model)

    @property
    def resumable(self) -> bool:
        return self.layer.traits.resumable

    def prefill(self, n_tokens: int, batch: int = 1) -> Operation:
        """One call without gradients, its state included."""
        x = self.inputs(batch, n_tokens)
        return self._quietly(lambda: self.layer(x, return_state=self.resumable))

    def decode(self, state: State) -> Operation:
        """One token after ``state``, of one sequence; the state after it included."""
        x = self.inputs(1, 1)
        return self._quietly(lambda: self.layer(x, state, return_state=True))

    def train(self, n_tokens: int, batch: int) -> Operation:
        """Forward and backward to the input and all parameters. The layer is put into training meanwhile."""
        x = self.inputs(batch, n_tokens).detach().requires_grad_()
        cotangent = torch.ones_like(x)

        def step() -> None:
            self.layer.train()
            try:
                with self.compute.autocast():
                    out = self.layer(x)
                losses = [value for name, value in out.aux.items() if name.startswith("loss/")]
                starts = [cotangent.to(out.y.dtype), *(torch.ones_like(loss) for loss in losses)]
                torch.autograd.backward([out.y, *losses], starts)
            finally:
                self.layer.zero_grad()
                x.grad = None
                self.layer.eval()

        return step

    def operation(self, point: Point) -> Operation:
        """Of a prefill or a training step."""
        if point.scene == "train":
            return self.train(point.tokens, point.batch)
        return self.prefill(point.tokens, point.batch)

    def state_after(self, n_tokens: int, batch: int = 1) -> tuple[State, State]:
        """The states after one token less, and after ``n_tokens``."""
        x = self.inputs(batch, n_tokens)
        before = self._quietly(lambda: self.layer(x[:, :-1], return_state=True))().state
        return before, self._quietly(lambda: self.layer(x[:, -1:], before, return_state=True))().state

    def _quietly(self, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad(), self.compute.autocast():
                return call()

        return run
