"""Gradients: they reach every parameter, and they are the derivative."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mixers.base import Mixer
from mixers.contract.errors import ContractError, NotApplicable
from mixers.contract.subject import Subject, n_tokens_to_try, require_finite, weighted_sum

N_POINTS = 5
# Central differences in float64: rounding 1e-16 / STEP and curvature STEP^2 both stay far below the limit.
STEP = 1e-7
DERIVATIVE_LIMIT = 1e-5


def parameter_gradients(subject: Subject) -> None:
    """Every parameter gets a finite gradient that isn't zero."""
    mixer = subject.build()
    x = subject.tokens(mixer, 2, n_tokens_to_try(mixer))
    weighted_sum(mixer, x, torch.randn_like(x)).backward()
    for name, parameter in mixer.named_parameters():
        if parameter.grad is None or not (parameter.grad != 0).any():
            raise ContractError(f"parameter {name!r} gets no gradient; what isn't trained belongs in a buffer")
        require_finite(parameter.grad, f"gradient of parameter {name!r}")


def finite_differences(subject: Subject) -> None:
    """In float64 the gradient of inputs, and of all parameters together, is the slope along random directions.

    Most of some inputs must agree, not all: close to a tie, a hard choice such as top-k jumps between both ends.
    """
    if subject.dtype != torch.float64:
        raise NotApplicable(f"works in {subject.dtype}, where rounding hides what a small step changes")
    mixer = subject.build()
    shape = subject.tokens(mixer, 2, n_tokens_to_try(mixer)).shape
    parameters = [parameter for parameter in mixer.parameters() if parameter.requires_grad]
    for what in ("inputs", "parameters") if parameters else ("inputs",):
        slopes = []
        for _ in range(N_POINTS):
            x = torch.randn(shape, dtype=torch.float64, device=subject.device, requires_grad=True)
            slopes.append(_slopes(mixer, x, [x] if what == "inputs" else parameters))
        found = sorted(slopes, key=_distance)[N_POINTS // 2]
        allowed = DERIVATIVE_LIMIT * max(1.0, found.norm)
        if not _distance(found) <= allowed:
            raise ContractError(
                f"gradient of the {what} says {found.expected:.6g} along a random direction, finite differences "
                f"{found.measured:.6g}: off",
                size=_distance(found),
                allowed=allowed,
            )


class _Slopes(NamedTuple):
    """Slope by the gradients and by a difference; norm of the gradients, as a slope may be small by cancellation."""

    expected: float
    measured: float
    norm: float


def _distance(slopes: _Slopes) -> float:
    """Infinite for NaN, which has no place in an order."""
    distance = abs(slopes.expected - slopes.measured)
    return float("inf") if math.isnan(distance) else distance


def _slopes(mixer: Mixer, x: Tensor, tensors: list[Tensor]) -> _Slopes:
    """Of a random sum of outputs along a random direction of ``tensors``, which end as they were."""
    weights = torch.randn_like(x)
    directions = [torch.randn_like(tensor) for tensor in tensors]
    found = torch.autograd.grad(weighted_sum(mixer, x, weights), tensors, allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]
    expected = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
    with torch.no_grad():
        values = [tensor.clone() for tensor in tensors]
        sums = []
        for step in (STEP, -STEP):
            for tensor, value, direction in zip(tensors, values, directions, strict=True):
                tensor.copy_(value + step * direction)
            sums.append(float(weighted_sum(mixer, x, weights)))
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
    return _Slopes(expected, (sums[0] - sums[1]) / (2 * STEP), norm)
