"""What sequences of a batch, and padded tokens, have to do with each other."""

from __future__ import annotations

import torch

from mixers.base import Mixer
from mixers.contract.errors import ContractError
from mixers.contract.subject import (
    LIMITS,
    Subject,
    difference,
    n_tokens_to_try,
    require_finite,
    require_same,
    run_in_parts,
)


def batch(subject: Subject) -> None:
    """Scope ``sequence``: alone or in a batch is the same, states included. Scope ``shared``: it is not."""
    mixer = subject.build()
    n_tokens = n_tokens_to_try(mixer)
    x = subject.tokens(mixer, 3, n_tokens)
    lengths = [n_tokens // 2, n_tokens - n_tokens // 2]
    with torch.no_grad():
        together, _ = run_in_parts(mixer, x, lengths)
        alone = torch.cat([run_in_parts(mixer, row[None], lengths)[0] for row in x])
    if mixer.state_scope == "sequence":
        require_same(together, alone, "output of a sequence in a batch, against the same sequence alone")
    elif difference(together, alone)[0] <= LIMITS[x.dtype]:
        raise ContractError("declared scope 'shared', but a sequence gives the same alone and in a batch")


def full_mask(subject: Subject) -> None:
    """A mask that masks nothing is no mask, in outputs and with a state that saw none."""
    mixer = subject.build()
    n_tokens = n_tokens_to_try(mixer)
    x = subject.tokens(mixer, 2, n_tokens)
    mask = subject.mask(2, n_tokens)
    y = mixer(x).y
    require_same(mixer(x, mask=mask).y, y, "output with a mask that masks nothing, against none")
    state = mixer(x[:, :8], return_state=True).state
    unmasked = mixer(x[:, 8:], state).y
    require_same(mixer(x[:, 8:], state, mask=mask[:, 8:]).y, unmasked, "the same, in a second call")


def padding(subject: Subject) -> None:
    """Masked tokens reach nobody, whatever they hold; cuts hold with a mask; a sequence of padding only stays
    finite; left padding changes nothing, unless chunks are counted from the first token.
    """
    mixer = subject.build()
    n_tokens = n_tokens_to_try(mixer)
    x = subject.tokens(mixer, 3, n_tokens)
    mask = subject.mask(3, n_tokens)
    mask[0, :3] = False
    mask[1, 7:9] = False
    y = mixer(x, mask=mask).y
    for content in (50 * torch.randn_like(x), torch.full_like(x, float("nan"))):
        changed = torch.where(mask[..., None], x, content)
        kind = "NaN" if content.isnan().any() else "other values"
        keep = mask[..., None].expand_as(y)
        found = torch.where(keep, mixer(changed, mask=mask).y, y)
        require_same(found, y, f"output at real tokens, when padding holds {kind}")
    if mixer.traits.causal:
        cut, _ = run_in_parts(mixer, x, [2, 6, n_tokens - 8], mask)
        require_same(cut, y, "output of three calls with a mask, against one")
    _require_finite_when_all_is_padding(mixer, x, mask)
    if mixer.traits.exact_chunking and mixer.state_scope == "sequence":
        require_same(y[:1, 3:], mixer(x[:1, 3:]).y, "output behind three padded tokens, against none")


def _require_finite_when_all_is_padding(mixer: Mixer, x: torch.Tensor, mask: torch.Tensor) -> None:
    mask = mask.clone()
    mask[2] = False
    x = x.clone().requires_grad_()
    y = mixer(x, mask=mask).y
    require_finite(y, "output, when one sequence is padding only")
    (gradient,) = torch.autograd.grad(y.sum(), x)
    require_finite(gradient, "gradient of the inputs, when one sequence is padding only")
