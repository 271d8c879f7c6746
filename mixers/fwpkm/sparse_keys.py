"""Addressing and the step of the sub-keys, forward and backward, written out: no autograd, no (S,n) gradients.

Letters: M memories, S queries per memory, H heads, k slots per head, J = H*k, n sub-keys per half, K key width.
``half_*`` tensors are (M,S,H,2,k): the k best sub-keys of each half of a query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.fwpkm.reference import ENTROPY_EPS, ChunkOptions
from mixers.fwpkm.sparse_rows import segment_sum
from mixers.product_keys import IDW_EPS, Score


class Addresses(NamedTuple):
    """What the queries of a chunk select, kept for the key step and the backward.

    half_indices (M,S,H,2,k) int64. half_distances: squared distances, None for ``dot``.
    half_weights: softmax over the k scores of each half (P of the addressing loss).
    pairs (M,S,H,k): the chosen sums, position1 * k + position2 within the two halves' lists.
    slots (M,S,J) int64 and weights (M,S,J): softmax over the J scores of a token, at the temperature.
    """

    half_indices: Tensor
    half_distances: Tensor | None
    half_weights: Tensor
    pairs: Tensor
    slots: Tensor
    weights: Tensor


class KeyGradients(NamedTuple):
    """Derivatives with respect to q (M,S,H,K) and keys (M,H,2,n,K/2)."""

    q: Tensor
    keys: Tensor


def address(q: Tensor, keys: Tensor, options: ChunkOptions) -> tuple[Addresses, Tensor]:
    """Addresses of q (M,S,H,K) in keys (M,H,2,n,K/2), and the differences of :func:`half_differences`."""
    raise NotImplementedError


def half_differences(q: Tensor, keys: Tensor, half_indices: Tensor, score: Score) -> Tensor:
    """Selected sub-key minus query half (``idw``), or the sub-key itself (``dot``): (M,S,H,2,k,K/2)."""
    raise NotImplementedError


def key_step(
    q: Tensor, keys: Tensor, at: Addresses, differences: Tensor, on_half: Tensor | None, options: ChunkOptions
) -> tuple[Tensor, Tensor]:
    """keys - lr * (gradient + weight_decay * keys) after a chunk, and its addressing loss ().

    ``on_half``: what the value loss adds to the gradient on the half scores (M,S,H,2,k), None for nothing.
    """
    raise NotImplementedError


def keys_backward(
    q: Tensor,
    keys: Tensor,
    at: Addresses,
    on_half: Tensor | None,
    d_new_keys: Tensor | None,
    d_weights: Tensor,
    options: ChunkOptions,
) -> tuple[KeyGradients, Tensor | None]:
    """Derivatives through :func:`key_step` and :func:`address`, and that of ``on_half`` (None where it is).

    d_new_keys (M,H,2,n,K/2): derivative of the keys after the chunk, None when nothing depends on them.
    d_weights (M,S,J): of the read weights.
    """
    raise NotImplementedError
