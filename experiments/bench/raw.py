"""What a layer adds to the kernel it calls: its calls are recorded on real inputs, then timed next to each other.

Three things are timed: the whole layer; the mixing operation, which is our function around the kernel (layout, dtypes,
masks, what the kernel does not do); and the kernel itself with the very arguments that it got. Nothing of the kernel's
is known here but its name, so a change of an adapter is measured as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.bench.layers import Bench, Operation

# Ours: where a layer looks its mixing operation up. The outermost call counts.
OPERATIONS = (
    ("mixers.softmax", "attend_sdpa"),
    ("mixers.softmax", "attend_flash"),
    ("mixers.lact", "attend_sdpa"),
    ("mixers.gated_deltanet", "gated_delta_rule"),
    ("mixers.delta_net", "gated_delta_rule"),
    ("mixers.gla", "decay_attention"),
    ("mixers.hgrn2", "decay_attention"),
    ("mixers.mamba2", "decay_attention"),
    ("mixers.retention", "decay_attention"),
    ("mixers.linear_attention", "_fla"),
    ("mixers.kda", "_fla"),
    ("mixers.rwkv7", "_fla"),
)
# Theirs, where our adapters look them up.
KERNELS = (
    ("torch.nn.functional", "scaled_dot_product_attention"),
    ("flash_attn", "flash_attn_func"),
    ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    ("fla.ops.gla", "chunk_gla"),
    ("fla.ops.simple_gla", "chunk_simple_gla"),
    ("fla.ops.linear_attn", "chunk_linear_attn"),
    ("fla.ops.kda", "chunk_kda"),
    ("fla.ops.rwkv7", "chunk_rwkv7"),
)


class Call(NamedTuple):
    """A recorded call; its tensors are cut off from what came before."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]


class Recorded(NamedTuple):
    """Calls of one pass through a layer, in order."""

    operations: list[Call]
    kernels: list[Call]


def record(bench: Bench, n_tokens: int, batch: int, backward: bool, device: str) -> Recorded:
    """Run the layer once, in training or without gradients, and keep what it calls."""
    found = Recorded([], [])
    is_gpu = device == "cuda"
    x = bench.inputs(batch, n_tokens).detach().requires_grad_(backward)
    # On the CPU fla's kernels can't be reached, and importing them takes seconds.
    kernels = [entry for entry in KERNELS if is_gpu or not entry[0].startswith(("fla.", "flash_attn"))]
    bench.layer.train(backward)
    try:
        with (
            _recording(OPERATIONS, found.operations),
            _recording(tuple(kernels), found.kernels),
            torch.set_grad_enabled(backward),
            bench.compute.autocast(),
        ):
            bench.layer(x)
    finally:
        bench.layer.eval()
    return found


@contextmanager
def _recording(entries: tuple[tuple[str, str], ...], calls: list[Call]) -> Iterator[None]:
    """While open, calls through these names are appended to ``calls``, but for those made inside another of them."""
    originals = []
    depth = 0

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal depth
            if depth == 0:
                calls.append(Call(name, function, _cut(args), _cut(options)))
            depth += 1
            try:
                return function(*args, **options)
            finally:
                depth -= 1

        return call

    try:
        for module_name, name in entries:
            if importlib.util.find_spec(module_name.partition(".")[0]) is None:
                continue
            module = importlib.import_module(module_name)
            original = getattr(module, name)
            originals.append((module, name, original))
            setattr(module, name, watched(name, original))
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _cut(values: Any) -> Any:
    """The same tensors, views and strides kept, as leaves; what is no tensor as it is."""
    if isinstance(values, Tensor):
        return values.detach().requires_grad_(values.requires_grad)
    if isinstance(values, dict):
        return {key: _cut(value) for key, value in values.items()}
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*map(_cut, values))
    return type(values)(map(_cut, values)) if isinstance(values, (tuple, list)) else values


def replay(calls: list[Call], backward: bool, bench: Bench) -> Operation:
    """All calls again, each followed by its backward pass if asked for, under the layer's autocast."""

    def run() -> None:
        for call in calls:
            with torch.set_grad_enabled(backward), bench.compute.autocast():
                out = _first_tensor(call.function(*call.args, **call.options))
            leaves = [leaf for leaf in _tensors((call.args, call.options)) if leaf.requires_grad]
            if backward and leaves:
                torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return run


def _first_tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else _first_tensor(out[0])


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, (tuple, list)):
        for value in values:
            found += _tensors(value)
    return found
