"""A SwiGLU network whose three matrices are a state: its value, and its gradients in closed form."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

MIN_NORM = 1e-6


class SwiGLUWeights(NamedTuple):
    """Of f(u) = (silu(u gate) * (u up)) down: gate and up (...,H,K,F), down (...,H,F,V)."""

    gate: Tensor
    up: Tensor
    down: Tensor


class SwiGLUActivations(NamedTuple):
    """Of inputs u (B,H,C,K): z = u gate, sigmoid(z), u up and hidden = silu(z) * (u up), all (B,H,C,F)."""

    before: Tensor
    sigmoid: Tensor
    up: Tensor
    hidden: Tensor


def swiglu(u: Tensor, weights: SwiGLUWeights) -> Tensor:
    """(silu(u gate) * (u up)) down: (B,H,C,K) -> (B,H,C,V)."""
    return (functional.silu(u @ weights.gate) * (u @ weights.up)) @ weights.down


def swiglu_activations(u: Tensor, weights: SwiGLUWeights) -> SwiGLUActivations:
    """What :func:`swiglu_gradient` needs of a forward pass; f(u) is ``hidden @ weights.down``."""
    before = u @ weights.gate
    sigmoid = before.sigmoid()
    up = u @ weights.up
    return SwiGLUActivations(before, sigmoid, up, before * sigmoid * up)


def swiglu_gradient(
    weights: SwiGLUWeights,
    u: Tensor,
    activations: SwiGLUActivations,
    to_output: Tensor,
    steps: SwiGLUWeights | None = None,
) -> SwiGLUWeights:
    """sum_t steps_t d l_t / d weights, with ``to_output`` = d l_t / d f(u_t) (B,H,C,V).

    ``steps`` (B,H,C,1) each, one for each matrix: factors of a token's gradient; None: all one.
    """
    before, sigmoid, up, hidden = activations
    to_hidden = to_output @ weights.down.transpose(-1, -2)
    to_gate = to_hidden * up * sigmoid * (1 + before * (1 - sigmoid))
    to_up = to_hidden * before * sigmoid
    if steps is not None:
        to_gate, to_up, to_output = steps.gate * to_gate, steps.up * to_up, steps.down * to_output
    inputs = u.transpose(-1, -2)
    return SwiGLUWeights(inputs @ to_gate, inputs @ to_up, hidden.transpose(-1, -2) @ to_output)


def with_length_of(weight: Tensor, start: Tensor) -> Tensor:
    """Each column of ``weight`` (B,H,I,O), the weights of one output, scaled to its length in ``start`` (H,I,O)."""
    wanted = start.to(weight.dtype).norm(dim=-2, keepdim=True)
    return weight * (wanted / weight.norm(dim=-2, keepdim=True).clamp_min(MIN_NORM))
