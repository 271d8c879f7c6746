"""Initial values and saved ones."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from mixers.base import Mixer
from mixers.contract.errors import ContractError
from mixers.contract.subject import Subject, n_tokens_to_try, require_finite, require_same

POISONS = (float("nan"), 7.0)


def reset(subject: Subject) -> None:
    """After NaN or 7 in every parameter and buffer, reset_parameters writes all of them, from the seed alone."""
    mixer = subject.build(subject.storage_dtype)
    results = []
    for poison in POISONS:
        for tensor in _tensors(mixer).values():
            tensor.detach().fill_(poison if tensor.is_floating_point() else 7)
        torch.manual_seed(subject.seed)
        mixer.reset_parameters()
        results.append({name: tensor.detach().clone() for name, tensor in _tensors(mixer).items()})
    first, second = results
    for name, tensor in first.items():
        require_finite(tensor, f"{name!r} after reset_parameters")
        if not torch.equal(tensor, second[name]):
            raise ContractError(
                f"{name!r} after reset_parameters isn't set by the seed alone: differs",
                size=float((tensor.double() - second[name].double()).abs().max()),
            )


def state_dict(subject: Subject) -> None:
    """Another instance, of other values, gives the same outputs after saving and loading."""
    mixer, other = subject.build(), subject.build(seed=1)
    x = subject.tokens(mixer, 2, n_tokens_to_try(mixer))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    file = io.BytesIO()
    torch.save(mixer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    require_same(other(x).y, mixer(x).y, "output after loading what another instance saved", limit=0.0)


def _tensors(mixer: Mixer) -> dict[str, Tensor]:
    """Parameters and all buffers, those too that aren't saved."""
    return {**dict(mixer.named_parameters()), **dict(mixer.named_buffers())}
