"""Equality first: what an implementation computes at a small size, against the reference in float64."""

from __future__ import annotations

import torch

from experiments.bench.case import Case
from experiments.bench.operations import Inputs, draw, draw_static, reads, static_step

BOUND = 1e-4  # of the largest entry; float32 costs a few 1e-6


def largest_error(impl: str, scope: str, device: str, seed: int) -> float:
    """Largest difference of the reads and of the gradients into q, v and gate, over the reference's largest entry.

    NaN where an entry is not finite: it is within no bound.
    """
    case = Case("train", impl, scope, 19, 2, 70, 16, 24, 13, 4, device, seed, backward=True)
    drawn = draw(case)
    results = []
    for by, dtype in (("reference", torch.float64), (impl, torch.float32)):
        parts = Inputs(*(part.to(dtype) for part in drawn))
        trained = [part.requires_grad_() for part in (part.clone() for part in parts[:3])]
        read = reads(Case(**(case.as_dict() | {"impl": by})), Inputs(*trained, *parts[3:]))
        results.append([read, *torch.autograd.grad(read.square().sum(), trained)])
    errors = torch.stack([((b - a).abs().max() / a.abs().max()).detach() for a, b in zip(*results, strict=True)])
    return errors.max().item()


def largest_static_error(impl: str, device: str, seed: int) -> float:
    """As :func:`largest_error`, of a static memory's read and its gradients into the table and the weights."""
    drawn = draw_static(Case("static", impl, "-", 9, 3, 70, 1, 24, 13, 5, device, seed, backward=True))
    wanted = static_step(
        "reference", type(drawn)(*(part if part.dtype == torch.int64 else part.double() for part in drawn))
    )
    pairs = zip(wanted, static_step(impl, drawn), strict=True)
    return torch.stack([(b - a).abs().max() / a.abs().max() for a, b in pairs]).max().item()


def why_static_wrong(impl: str, device: str, seed: int) -> str | None:
    """One line if the static read of ``impl`` is not torch's ``embedding_bag`` in float64."""
    error = largest_static_error(impl, device, seed)
    return (
        None if error <= BOUND else f"differs from the float64 reference by {error:.1e} of its largest entry: not timed"
    )


def why_wrong(impl: str, device: str, seed: int) -> str | None:
    """One line if ``impl`` does not compute what the reference computes, in either scope."""
    for scope in ("shared", "sequence"):
        error = largest_error(impl, scope, device, seed)
        if not error <= BOUND:
            return f"differs from the float64 reference by {error:.1e} of its largest entry (scope {scope}): not timed"
    return None
