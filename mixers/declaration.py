"""What a class must declare to be registered. Checked when it is, so that a mistake has a file and a line."""

from __future__ import annotations

import inspect
import typing
from typing import Any

from mixers.base import SLOTS, Mixer, Traits
from mixers.config import MixerConfig
from mixers.errors import UserError, nearest

# method -> positional arguments, keywords: what callers pass.
CALLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "forward": (("x", "state"), ("return_state", "mask")),
    "initial_state": (("batch_size",), ("device", "dtype")),
    "reset_parameters": ((), ()),
    "flops_per_token": (("context",), ()),
}
RESERVED = ("none",)  # a pattern's word for an empty slot
KINDS = {"family": str, "source": str, "normalises_input": bool}


def require_name(name: Any) -> None:
    """Raise :class:`UserError` unless ``name`` is a word that patterns and files can hold."""
    if not isinstance(name, str):
        raise UserError(f"@register takes the mixer's name: write @register('my_mixer'), got {_shown(name)}")
    if not (name.isidentifier() and name.isascii()):
        raise UserError(f"a mixer's name is letters, digits and underscores and starts with no digit, got {name!r}")
    if name in RESERVED:
        raise UserError(f"the name {name!r} means an empty slot in a pattern; choose another")


def require_declared(cls: type[Mixer], name: str) -> None:
    """Raise :class:`UserError` unless ``cls`` has every method and declaration of :class:`Mixer`, of the right kind."""

    def require(condition: bool, text: str) -> None:
        if not condition:
            raise UserError(f"mixer {name!r}: {cls.__qualname__}{text}")

    missing = sorted(cls.__abstractmethods__)
    calls = ", ".join(_call(method) for method in missing)
    require(not missing, f" lacks {calls}; add {'it' if len(missing) == 1 else 'them'}")
    for method in CALLS:
        problem = _refuses(getattr(cls, method), method)
        require(not problem, f".{method} must be callable as {_call(method)}: {problem}; mend its signature")

    config = cls.Config
    require(
        isinstance(config, type) and issubclass(config, MixerConfig),
        f".Config must be a subclass of mixers.base.MixerConfig, got {_shown(config)}",
    )
    declared = any("traits" in vars(base) for base in cls.__mro__ if base is not Mixer)
    require(declared, " declares no traits; add traits = Traits(state_growth='constant'), or what holds")
    traits = cls.traits
    require(isinstance(traits, Traits), f".traits must be mixers.base.Traits(...), got {_shown(traits)}")
    hints = typing.get_type_hints(Traits)
    for field in ("state_scope", "state_growth"):
        value, known = getattr(traits, field), typing.get_args(hints[field])
        require(value in known, f".traits: {field}={value!r} is none of its values{nearest(str(value), known)}")
        require(
            value != "config" or getattr(cls, field) is not getattr(Mixer, field),
            f".traits: {field}='config' needs a property {field} that says what the options resolve to; add it",
        )
    for field in ("causal", "exact_chunking"):
        require(isinstance(getattr(traits, field), bool), f".traits: {field} must be True or False")
    devices = traits.devices
    require(
        isinstance(devices, tuple) and bool(devices) and all(isinstance(device, str) for device in devices),
        f".traits: devices must be a tuple of names such as ('cpu', 'cuda'), got {devices!r}",
    )
    slot = cls.default_slot
    require(slot in SLOTS, f".default_slot={slot!r} is no slot{nearest(str(slot), SLOTS)}")
    for field, kind in KINDS.items():
        value = getattr(cls, field)
        require(isinstance(value, kind), f".{field} must be a {kind.__name__}, got {_shown(value)}")


def _call(method: str) -> str:
    positional, keywords = CALLS[method]
    return f"{method}({', '.join([*positional, *(f'{word}=...' for word in keywords)])})"


def _refuses(function: Any, method: str) -> str:
    """Why a call as callers make it would fail; empty when it wouldn't."""
    positional, keywords = CALLS[method]
    if not callable(function):
        return f"it is {_shown(function)}"
    try:
        inspect.signature(function).bind(None, *positional, **dict.fromkeys(keywords))
    except TypeError as error:
        return str(error)
    return ""


def _shown(value: Any) -> str:
    """A value in a word or two: reprs of classes and tensors can be pages long."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
