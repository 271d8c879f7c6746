"""Whether a tensor that is needed again was changed in place meanwhile."""

from __future__ import annotations

from torch import Tensor

from mixers.errors import UserError


def changes(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None in inference mode, where that isn't counted."""
    return None if tensor.is_inference() else tensor._version


def require_unchanged(name: str, tensor: Tensor, seen: int | None) -> None:
    """Raise :class:`UserError` if ``tensor`` was changed since it had ``seen`` :func:`changes`."""
    if changes(tensor) != seen:
        raise UserError(
            f"fast_weight_pkm: {name} were changed in place after the call and before its result's values were read; "
            "read out.values first, or pass a copy"
        )
