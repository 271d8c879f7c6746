"""The library's mutable cache as a state: tensors in, tensors out, nobody's tensor changed.

A cache of one layer holds a dict of four entries (recurrent, attn, conv, ffn), each None, a tensor, a list or tuple, or
a dataclass of tensors, and the number of tokens seen, an int.
"""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Updated in place by some kernels, and small: copied before every call. Keys and values only ever grow by copies.
CHANGED_IN_PLACE = ("recurrent_state", "conv_state", "ffn_state")

_frozen_types: dict[type, type] = {}  # dataclass -> its named tuple
_thawed_types: dict[type, type] = {}  # and back


class FlaState(NamedTuple):
    """cache: the layer's own entries, None before the first token; seen: int64 scalar on the CPU, tokens so far,
    padding included (on the CPU, since the layers take a number: reading it must not wait for the GPU); padding: (B,)
    int64, padded tokens at the left of each sequence, None where no call had a mask."""

    cache: dict[str, Any] | None
    seen: Tensor
    padding: Tensor | None


def frozen(entries: dict[str, Any], outer: Tensor) -> dict[str, Any]:
    """Entries of a cache as a pytree that shares no memory with ``outer`` and keeps no larger buffer alive."""

    def own(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        return tensor if is_whole and storage.data_ptr() != outer.untyped_storage().data_ptr() else tensor.clone()

    return {name: _walk(value, own, _freeze) for name, value in entries.items()}


def thawed(cache: dict[str, Any]) -> dict[str, Any]:
    """Entries that a layer may change in place, from a state that it may not."""
    return {
        name: _walk(value, Tensor.clone if name in CHANGED_IN_PLACE else lambda tensor: tensor, _thaw)
        for name, value in cache.items()
    }


def _walk(value: Any, fn: Callable[[Tensor], Tensor], convert: Callable[[Any, Callable[[Any], Any]], Any]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    return convert(value, lambda item: _walk(item, fn, convert))


def _freeze(value: Any, inner: Callable[[Any], Any]) -> Any:
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        return type(value)(inner(item) for item in value)
    if dataclasses.is_dataclass(value):
        return _named_tuple(type(value))(*(inner(getattr(value, field.name)) for field in dataclasses.fields(value)))
    raise TypeError(f"a layer's cache holds a {type(value).__name__}: not known how to carry it")


def _thaw(value: Any, inner: Callable[[Any], Any]) -> Any:
    if value is None:
        return None
    if type(value) in _thawed_types:
        return _thawed_types[type(value)](*(inner(item) for item in value))
    return type(value)(inner(item) for item in value)


def _named_tuple(dataclass: type) -> type:
    """The named tuple that stands for a dataclass: states hold no others."""
    if dataclass not in _frozen_types:
        kind = namedtuple(dataclass.__name__, [field.name for field in dataclasses.fields(dataclass)])
        _frozen_types[dataclass], _thawed_types[kind] = kind, dataclass
    return _frozen_types[dataclass]


def count(n_tokens: int) -> Tensor:
    return torch.tensor(n_tokens, dtype=torch.int64)
