"""Every fast path has a readable twin, and is it."""

from __future__ import annotations

import torch

from mixers.base import Mixer, State
from mixers.contract.errors import ContractError, NotApplicable
from mixers.contract.subject import Subject, chunk_size, n_tokens_to_try, require_same


def twin(subject: Subject) -> None:
    """An implementation other than ``reference`` gives the outputs and gradients of ``reference`` with the same
    weights: from nothing, from a state of ``reference``, and with left padding; a token at a time; and from the
    state that each leaves.
    """
    mixer, readable = subject.build(), subject.readable()
    if mixer.impl == readable.impl:
        raise NotApplicable(f"runs as {mixer.impl!r} only here")
    n_tokens = n_tokens_to_try(mixer)
    x = subject.tokens(mixer, 2, n_tokens)
    mask = subject.mask(2, n_tokens)
    mask[1, :3] = False
    with torch.no_grad():
        start = readable(subject.tokens(mixer, 2, chunk_size(mixer) or 5), return_state=True).state
    versus = f"of impl={mixer.impl!r}, against {readable.impl!r}"
    for name, state, padding in (("", None, None), (" from a state", start, None), (" with left padding", None, mask)):
        _require_same_results(mixer, readable, x, state, padding, f"{versus}{name}")
    with torch.no_grad():
        got, want = mixer(x[:, :1], start, return_state=True), readable(x[:, :1], start, return_state=True)
        require_same(got.y, want.y, f"output for one token {versus}")
        got, want = mixer(x[:, 1:], got.state), readable(x[:, 1:], want.state)
        require_same(got.y, want.y, f"output after one token {versus}")


def _require_same_results(
    mixer: Mixer, readable: Mixer, x: torch.Tensor, state: State, mask: torch.Tensor | None, versus: str
) -> None:
    outs, gradients = [], []
    weights = torch.randn_like(x)
    for layer in (mixer, readable):
        leaf = x.clone().requires_grad_()
        out = layer(leaf, state, return_state=True, mask=mask)
        tensors = [leaf, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        loss = (out.y * weights).sum() + sum(value for name, value in out.aux.items() if name.startswith("loss/"))
        gradients.append(torch.autograd.grad(loss, tensors, allow_unused=True))
        outs.append(out)
    require_same(outs[0].y, outs[1].y, f"output {versus}")
    with torch.no_grad():
        after = [layer(x, out.state).y for layer, out in zip((mixer, readable), outs, strict=True)]
    require_same(after[0], after[1], f"output of a next call {versus}")
    names = ["the inputs", *(name for name, parameter in mixer.named_parameters() if parameter.requires_grad)]
    for name, got, want in zip(names, *gradients, strict=True):
        if (got is None) != (want is None):
            raise ContractError(f"gradient of {name} {versus}: exists on one side only")
        if got is not None and want is not None:
            require_same(got, want, f"gradient of {name} {versus}")
