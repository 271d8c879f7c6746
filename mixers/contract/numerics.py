"""The same numbers twice, in training and evaluation, in bfloat16 and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from mixers.contract.errors import ContractError, NotApplicable
from mixers.contract.subject import (
    LIMITS,
    Subject,
    difference,
    n_tokens_to_try,
    require_finite,
    require_same,
    weighted_sum,
)

# Error of bfloat16 arithmetic, in units of what rounding inputs and weights to bfloat16 costs anyway.
BF16_FACTOR = 4.0
# Half a unit in the last of bfloat16's 8 bits: what rounding y itself may cost.
BF16_ROUNDING = 2.0**-9


def determinism(subject: Subject) -> None:
    """Two calls give the same bits: in evaluation as they are, in training from the same seed."""
    mixer = subject.build()
    x = subject.tokens(mixer, 2, n_tokens_to_try(mixer))
    mixer.eval()
    first, second = mixer(x).y, mixer(x).y
    require_same(second, first, "output of a second call in evaluation", limit=0.0)
    mixer.train()
    ys = []
    for _ in range(2):
        torch.manual_seed(subject.seed)
        ys.append(mixer(x).y)
    require_same(ys[1], ys[0], "output of a second call in training, from the same seed", limit=0.0)


def train_eval(subject: Subject) -> None:
    """train() and eval() give the same outputs; others where the mixer declares ``batch_statistics``."""
    mixer = subject.build()
    x = subject.tokens(mixer, 2, n_tokens_to_try(mixer))
    evaluated, trained = mixer.eval()(x).y, mixer.train()(x).y
    if not mixer.batch_statistics:
        require_same(trained, evaluated, "output in training, against evaluation")
        return
    if difference(trained, evaluated)[0] <= LIMITS[x.dtype]:
        raise ContractError("batch_statistics are declared, but training gives the outputs of evaluation")
    raise NotApplicable("declares batch_statistics: training differs from evaluation, which all other checks measure")


def bf16(subject: Subject) -> None:
    """Under autocast to bfloat16, as in training, the error is at most 4 times that of float64 with inputs and
    weights rounded to bfloat16, plus the rounding of y.

    Compared is the median over the tokens of each token's error, because near a tie a hard choice such as top-k
    may flip at some of them.
    """
    exact = subject.readable(torch.float64)
    x = subject.tokens(exact, 2, n_tokens_to_try(exact), torch.float64)
    with torch.no_grad():
        y = exact(x).y
        rounded = subject.readable(torch.bfloat16).double()
        unavoidable = _median_norm(rounded(x.bfloat16().double()).y - y)
        with torch.autocast(subject.device.type, dtype=torch.bfloat16):
            found = subject.build(torch.float32)(x.float()).y
    require_finite(found, "output under autocast to bfloat16")
    size = _median_norm(found.double() - y)
    limit = BF16_FACTOR * (unavoidable + BF16_ROUNDING * _median_norm(y))
    if not size <= limit:
        raise ContractError(
            "output under autocast to bfloat16 differs from float64",
            position="median over the tokens",
            size=size,
            allowed=limit,
        )


def _median_norm(x: Tensor) -> float:
    """Median over B and T of the Euclidean length over D."""
    return float(x.norm(dim=-1).median())


class _Backend:
    """``aot_eager`` while ``by_aot``, then ``eager``, of the same trace: to trace takes most of the time."""

    by_aot = True

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        by_aot = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        return lambda *values: (by_aot if self.by_aot else graph)(*values)


def compile(subject: Subject) -> None:
    """torch.compile gives the same outputs and gradients: on CUDA by ``inductor``; elsewhere outputs by ``aot_eager``
    and gradients by ``eager``, traced as for a GPU but run without a compiler.
    """
    on_cuda = subject.device.type == "cuda"
    mixer = subject.build()
    x = subject.tokens(mixer, 2, n_tokens_to_try(mixer))
    weights = torch.randn_like(x)
    trained = {name: parameter for name, parameter in mixer.named_parameters() if parameter.requires_grad}
    tensors = [x.requires_grad_(), *trained.values()]
    y = mixer(x).y
    gradients = torch.autograd.grad(weighted_sum(mixer, x, weights), tensors, allow_unused=True)
    try:
        torch._dynamo.reset()
        backend = _Backend()
        compiled = torch.compile(mixer, backend="inductor" if on_cuda else backend, dynamic=False)
        require_same(compiled(x).y, y, "compiled output, against eager")
        # Not by aot_eager: its backward graph fixes views to strides that its own operations do not always keep
        # (github.com/pytorch/pytorch/issues/120035); inductor has no such trouble.
        backend.by_aot = False
        found = torch.autograd.grad(weighted_sum(compiled, x, weights), tensors, allow_unused=True)
    finally:
        torch._dynamo.reset()
    for name, got, want in zip(("the inputs", *trained), found, gradients, strict=True):
        if (got is None) != (want is None):
            raise ContractError(f"compiled gradient of {name} exists on one side only")
        if got is not None and want is not None:
            require_same(got, want, f"compiled gradient of {name}, against eager")
