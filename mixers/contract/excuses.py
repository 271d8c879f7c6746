"""What mixers may fail, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mixers.base import Mixer

# Of the mixers in this package, by name. A mixer elsewhere declares a class attribute ``contract_excuses``.
EXCUSES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "fwpkm": {
            "full_mask": "update_scale='released' counts a chunk's tokens without a mask, its unmasked pairs with one",
        },
        "softmax": {
            "nan_in_future": "all queries of a call share one product with the values, and 0 * NaN is NaN",
        },
    }
)


def declared_excuses(cls: type[Mixer]) -> dict[str, str]:
    """Check name -> reason, for this class."""
    return {**EXCUSES.get(cls.name, {}), **getattr(cls, "contract_excuses", {})}
