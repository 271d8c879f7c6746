"""What ``mixlab mixers --fla`` tells of each layer, without importing any."""

from __future__ import annotations

from typing import Any

from mixers.fla_layers.catalog import package_folder, sources
from mixers.fla_layers.facts import FACTS
from mixers.fla_layers.layer import PREFIX, layer_class

CONTINUES = {"any": "any calls", "single": "token by token", "never": "no state"}


def layer_names() -> list[str]:
    """Names of all layers that are mixers, sorted; none where the library isn't installed."""
    folder = package_folder()
    return [] if folder is None else [PREFIX + name for name in sources(folder) if name in FACTS]


def describe_layer(name: str) -> dict[str, Any]:
    """One layer as JSON values. ``state_bytes`` and ``flops_per_token`` are None: measured on a GPU, and unknown."""
    cls = layer_class(name)
    facts = cls.facts
    return {
        "name": name,
        "family": cls.family,
        "class": f"fla.layers.{cls.layer_source.class_name}",
        "default_slot": cls.default_slot,
        "devices": list(cls.traits.devices),
        "state_growth": facts.growth,
        "continues": facts.continues,
        "state_bytes": None,
        "flops_per_token": None,
        "needs": list(facts.needs),
        "note": facts.note,
        "options": {
            field: None if info.is_required() else repr(info.default) for field, info in cls.Config.model_fields.items()
        },
        "source": cls.source,
    }
