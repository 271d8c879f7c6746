"""Which implementation runs: what is asked for, what is installed, and where the layer stands.

Nothing is tried and caught: a package is looked up by name, a device is read from a parameter. What was asked
for and can't run is an error that says why and how to get it.
"""

from __future__ import annotations

import importlib.util

import torch

from mixers.errors import UserError


def _missing(*packages: str) -> tuple[str, ...]:
    return tuple(name for name in packages if importlib.util.find_spec(name) is None)


# Looked up once, without importing them: constants, so that torch.compile can trace through what reads them.
FLA_MISSING = _missing("fla", "triton")
FLASH_ATTN_MISSING = _missing("flash_attn")
FLA_INSTALL = "pip install 'flash-linear-attention>=0.6,<0.7' triton"
FLASH_ATTN_INSTALL = "pip install 'mixlab[gpu]'"


def require_fla(place: str) -> None:
    """Raise :class:`UserError` unless flash-linear-attention and triton are installed."""
    if FLA_MISSING:
        raise UserError(
            f"{place}: impl='fla' needs the package {' and '.join(FLA_MISSING)}, not installed here; "
            f"on Linux with an NVIDIA GPU: {FLA_INSTALL}; else impl='reference'"
        )


def require_flash_attn(place: str) -> None:
    """Raise :class:`UserError` unless flash-attn is installed."""
    if FLASH_ATTN_MISSING:
        raise UserError(
            f"{place}: impl='flash_attn' needs the package flash_attn, not installed here; "
            f"on Linux with an NVIDIA GPU: {FLASH_ATTN_INSTALL}; else impl='sdpa'"
        )


def resolve_fla(requested: str, device: torch.device, place: str, unsupported: str = "") -> str:
    """``reference`` or ``fla`` for ``requested`` (``auto``, ``reference``, ``fla``) on ``device``.

    ``auto`` takes fla on CUDA where it is installed. ``unsupported`` says why these options have no fla kernel
    (empty: they have one).

    Raises:
        UserError: fla is asked for and its packages are missing, the layer is not on CUDA, or no kernel fits.
    """
    if requested == "reference":
        return "reference"
    if requested == "auto":
        usable = device.type == "cuda" and not unsupported and not FLA_MISSING
        return "fla" if usable else "reference"
    assert requested == "fla", requested
    require_fla(place)
    if device.type != "cuda":
        raise UserError(
            f"{place}: impl='fla' runs on cuda only and the layer is on {device.type}; "
            "move it there, or use impl='auto' or 'reference'"
        )
    if unsupported:
        raise UserError(f"{place}: impl='fla' has no kernel for {unsupported}; use impl='auto' or 'reference'")
    return "fla"
