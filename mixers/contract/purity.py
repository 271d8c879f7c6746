"""forward changes nothing: not the module, not its arguments, not the global generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mixers.base import Mixer, map_state, state_tensors
from mixers.contract.errors import ContractError
from mixers.contract.subject import Subject

# Held by nn.Module itself: their contents are compared as tensors.
CONTAINERS = frozenset({"_parameters", "_buffers", "_modules"})


def purity(subject: Subject) -> None:
    """forward leaves parameters, buffers, attributes, training flag, generator, x and state as they were. In training
    it writes exactly the buffers that ``batch_statistics`` names.
    """
    for training in (True, False):
        mixer = subject.build().train(training)
        x = subject.tokens(mixer, 2, 13)
        # From another instance, so that a first call is watched too. Copies: an expanded view can't be written to,
        # and would hide the fault behind an error.
        state = map_state(lambda part: part.detach().clone(), subject.build()(x, return_state=True).state)
        before = {"x": x.clone(), **_tensors(mixer), **_state(state)}
        statistics = _declared_statistics(mixer)
        attributes = _attributes(mixer)
        generator = _generators(subject)
        mixer(x, state, return_state=True)
        where = "training" if training else "evaluation"
        if not torch.equal(_generators(subject), generator):
            raise ContractError("forward draws from the global random generator", position=where)
        for name, now in {"x": x, **_live_tensors(mixer), **_state(state)}.items():
            if name not in before:
                raise ContractError(f"forward adds {name}", position=where)
            if training and name in statistics:
                _require_changed(now, before[name], name, where)
            else:
                _require_unchanged(now, before[name], name, where)
        for name, value in _attributes(mixer).items():
            if name not in attributes or attributes[name] is not value:
                raise ContractError(f"forward sets the attribute {name}", position=where)


def _generators(subject: Subject) -> torch.Tensor:
    """Where torch's global generators stand: the CPU's, and the device's own."""
    states = [torch.get_rng_state()]
    if subject.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(subject.device))
    return torch.cat(states)


def _require_unchanged(now: torch.Tensor, before: torch.Tensor, name: str, where: str) -> None:
    if not torch.equal(now, before):
        size = float((now.double() - before.double()).abs().max()) if now.shape == before.shape else None
        raise ContractError(f"forward changes {name}", position=where, size=size)


def _require_changed(now: torch.Tensor, before: torch.Tensor, name: str, where: str) -> None:
    if torch.equal(now, before):
        raise ContractError(f"batch_statistics declares {name}, which forward doesn't write", position=where)


def _declared_statistics(mixer: Mixer) -> set[str]:
    """The names as in :func:`_live_tensors`. Only buffers: what an optimiser trains is never written in forward."""
    unknown = set(mixer.batch_statistics) - {name for name, _ in mixer.named_buffers()}
    if unknown:
        raise ContractError(f"batch_statistics names {', '.join(sorted(unknown))}: no such buffer")
    return {f"the parameter or buffer {name!r}" for name in mixer.batch_statistics}


def _live_tensors(mixer: nn.Module) -> dict[str, torch.Tensor]:
    named = [*mixer.named_parameters(), *mixer.named_buffers()]
    return {f"the parameter or buffer {name!r}": tensor.detach() for name, tensor in named}


def _tensors(mixer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in _live_tensors(mixer).items()}


def _state(state: Any) -> dict[str, torch.Tensor]:
    return {f"tensor {i} of the given state": part.clone() for i, part in enumerate(state_tensors(state))}


def _attributes(mixer: nn.Module) -> dict[str, Any]:
    """Attributes of all submodules, the training flags among them."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in mixer.named_modules()
        for name, value in vars(module).items()
        if name not in CONTAINERS
    }
