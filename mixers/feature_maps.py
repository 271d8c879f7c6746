"""Feature maps of linear attention: phi with phi(q).phi(k) in place of exp(q.k / sqrt(K))."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

FeatureMap = Literal["elu", "identity", "relu", "taylor"]


def n_features(feature_map: FeatureMap, key_dim: int) -> int:
    """Width F of phi for keys of width K."""
    return 1 + key_dim + key_dim * (key_dim + 1) // 2 if feature_map == "taylor" else key_dim


def apply_feature_map(feature_map: FeatureMap, x: Tensor) -> Tensor:
    """phi of the last dimension, (...,K) -> (...,F).

    elu: elu(x) + 1, positive (arXiv:2006.16236). relu: max(x, 0) (arXiv:2103.13076). identity: x.
    taylor: phi(q).phi(k) = 1 + q.k / sqrt(K) + (q.k)^2 / (2 K), the exponential to second order, at least 1/2
    (Based, arXiv:2402.18668). There the K^2 products q_i q_j are all kept; ours keeps one of each pair i < j,
    times sqrt(2): the same kernel from (K^2 - K) / 2 features fewer.
    """
    if feature_map == "elu":
        return functional.elu(x) + 1
    if feature_map == "relu":
        return functional.relu(x)
    if feature_map == "identity":
        return x
    assert feature_map == "taylor", feature_map
    return _taylor(x)


def _taylor(x: Tensor) -> Tensor:
    key_dim = x.shape[-1]
    scaled = x * key_dim**-0.25
    # Every pair once, by the distance of its members on a circle: slices and products, no gather.
    circle = torch.cat([scaled, scaled], dim=-1)
    pairs = [scaled * circle[..., step : step + key_dim] for step in range(1, (key_dim + 1) // 2)]
    if key_dim % 2 == 0:
        half = key_dim // 2
        pairs.append(scaled[..., :half] * scaled[..., half:])
    return torch.cat([torch.ones_like(x[..., :1]), scaled, scaled.square() * 0.5**0.5, *pairs], dim=-1)
