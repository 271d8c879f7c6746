"""Padding masks (B,T) bool, False = padding: the same check and the same zeroing in every mixer."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.errors import UserError


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` (B,T,...) with the entries at padded positions replaced by zero, whatever they held (NaN too).

    Raises:
        UserError: the mask is not bool of shape (B,T).
    """
    if mask is None:
        return x
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise UserError(
            f"mask: must be bool of shape (B,T) = {tuple(x.shape[:2])}, False at padding, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return x.masked_fill(~mask.reshape(mask.shape + (1,) * (x.ndim - 2)), 0)
