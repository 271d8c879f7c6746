"""Which implementation runs: what is asked for, what is installed, and where the layer stands.

Nothing is tried and caught: a package is looked up by name, a device is read from a parameter. What was asked
for and can't run is an error that says why and how to get it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

import torch

from mixers.errors import UserError


def _missing(*packages: str) -> tuple[str, ...]:
    return tuple(name for name in packages if importlib.util.find_spec(name) is None)


# Looked up once, without importing them: constants, so that torch.compile can trace through what reads them.
FLA_MISSING = _missing("fla", "triton")
FLASH_ATTN_MISSING = _missing("flash_attn")
TRITON_MISSING = _missing("triton")
FLA_INSTALL = "pip install 'flash-linear-attention>=0.6,<0.7' triton"
FLASH_ATTN_INSTALL = "pip install 'mixlab[gpu]'"
TRITON_INSTALL = "pip install triton"
# With these versions of triton, one kernel of fla 0.6 gives wrong gradients on Hopper, and fla raises instead: that of
# q, k and decay where a head has one decay for each token (chunk_bwd_dqkwg in fla/ops/common/chunk_o.py).
TRITON_FAULT_FROM, TRITON_FAULT_BELOW = (3, 4, 0), (3, 7, 1)
TRITON_MENDED = "pip install 'triton>=3.7.1'"
HOPPER = 9  # major compute capability


def _version(package: str) -> tuple[int, ...] | None:
    """The release numbers of an installed package; None where it's absent."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


TRITON = _version("triton")
TILELANG_MISSING = _missing("tilelang")


def gated_backward_fault(device: torch.device, *, mended_by_tilelang: bool = True) -> str:
    """Why gradients of a gated recurrence can't be taken with fla's kernels on ``device``; empty: they can.

    mended_by_tilelang: fla has a second kernel in tilelang for this layer, which it takes where that is installed.
    """
    if device.type != "cuda" or TRITON is None or not TRITON_FAULT_FROM <= TRITON < TRITON_FAULT_BELOW:
        return ""
    if torch.cuda.get_device_properties(device).major != HOPPER or (mended_by_tilelang and not TILELANG_MISSING):
        return ""
    version = ".".join(map(str, TRITON))
    tilelang = " or pip install tilelang" if mended_by_tilelang else ""
    return (
        f"gated gradients with triton {version} on Hopper (fla refuses 3.4.0 to below 3.7.1; {TRITON_MENDED}{tilelang})"
    )


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
