"""One call equals many: the state carries everything, and nothing else does."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.base import Mixer, State
from mixers.contract.errors import ContractError, NotApplicable
from mixers.contract.subject import (
    Subject,
    chunk_size,
    n_tokens_to_try,
    require_same,
    require_same_state,
    run_in_parts,
)

N_RANDOM_CUTS = 3


def cuts(subject: Subject) -> None:
    """Any cut into calls, single tokens and empty calls included, gives the outputs, the state and the input
    gradients of one call.
    """
    mixer = subject.build()
    if not mixer.traits.causal:
        raise NotApplicable("declared as not causal: outputs of a first call can't know the second")
    n_tokens = n_tokens_to_try(mixer)
    x = subject.tokens(mixer, 2, n_tokens)
    weights = torch.randn_like(x)
    y, state, gradient = _run(mixer, x, [n_tokens], weights)
    for lengths in _cuts(n_tokens, chunk_size(mixer) or 8):
        cut_y, cut_state, cut_gradient = _run(mixer, x, lengths, weights)
        calls = "single tokens" if len(lengths) == n_tokens else f"calls of {lengths} tokens"
        require_same(cut_y, y, f"output of {calls}, against one call")
        require_same_state(cut_state, state, f"state after {calls}, against one call")
        require_same(cut_gradient, gradient, f"input gradient of {calls}, against one call")


def _cuts(n_tokens: int, chunk: int) -> list[list[int]]:
    cuts = [[1] * n_tokens, [0, 1, 0, n_tokens - 1, 0], [chunk, n_tokens - chunk], [n_tokens - 1, 1]]
    for _ in range(N_RANDOM_CUTS):
        marks = sorted(torch.randint(0, n_tokens + 1, (4,)).tolist())
        cuts.append([stop - start for start, stop in zip([0, *marks], [*marks, n_tokens], strict=True)])
    return cuts


def _run(mixer: Mixer, x: Tensor, lengths: list[int], weights: Tensor) -> tuple[Tensor, State, Tensor]:
    x = x.clone().requires_grad_()
    y, state = run_in_parts(mixer, x, lengths)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    return y.detach(), state, gradient


def initial_state(subject: Subject) -> None:
    """Starting from initial_state equals starting from None, in outputs and in the state after it."""
    mixer = subject.build()
    x = subject.tokens(mixer, 2, 13)
    start = mixer.initial_state(2, device=subject.device, dtype=x.dtype)
    if (start is None) != (mixer.state_growth == "none"):
        raise ContractError(f"declared growth {mixer.state_growth!r}, but initial_state gives {type(start).__name__}")
    none, given = mixer(x, return_state=True), mixer(x, start, return_state=True)
    require_same(given.y, none.y, "output from initial_state, against that from None")
    require_same_state(given.state, none.state, "state from initial_state, against that from None")
