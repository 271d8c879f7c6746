"""Which rows of which parameters a token reads: as declared, measured by poisoning the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixers.base import Mixer
from mixers.contract.errors import ContractError
from mixers.contract.subject import Subject, n_tokens_to_try, weighted_sum

# Tokens of which the one that reads most rows is looked at: choices of two heads may meet.
N_CANDIDATES = 32


def active_parameters(subject: Subject) -> None:
    """active_rows is what one token reads of each table it names, and names each of which any token leaves rows unread.

    A row is read when NaN in it changes the output.
    """
    mixer = subject.build()
    trained = {name: parameter for name, parameter in mixer.named_parameters() if parameter.requires_grad}
    declared = mixer.active_rows()
    for name, n_declared in declared.items():
        if name not in trained:
            raise ContractError(f"active_rows names {name!r}, which is no trained parameter")
        n_read = _rows_read_by_a_token(subject, mixer, trained[name])
        if n_read != n_declared:
            raise ContractError(
                f"active_rows declares {n_declared:,} rows of {name!r}, a token reads {n_read:,} of "
                f"{len(trained[name]):,}"
            )
    x = subject.tokens(mixer, 1, n_tokens_to_try(mixer))
    for name, parameter in trained.items():
        if name in declared or parameter.ndim < 2:
            continue
        unread = ~_touched(mixer, x, parameter)
        if unread.any() and not _changes(mixer, x, parameter, unread):
            raise ContractError(
                f"{x.shape[1]} tokens leave {int(unread.sum()):,} of the {len(parameter):,} rows of {name!r} unread; "
                "active_rows must say how many a token reads"
            )


def _rows_read_by_a_token(subject: Subject, mixer: Mixer, table: nn.Parameter) -> int:
    tokens = subject.tokens(mixer, N_CANDIDATES, 1)
    token = max(tokens.split(1), key=lambda one: int(_touched(mixer, one, table).sum()))
    n_read, suspects = 0, [torch.arange(len(table), device=table.device)]
    while suspects:  # halve what is read until it is one row
        rows = suspects.pop()
        if _changes(mixer, token, table, rows):
            if len(rows) == 1:
                n_read += 1
            else:
                suspects += rows.chunk(2)
    return n_read


def _touched(mixer: Mixer, x: Tensor, parameter: nn.Parameter) -> Tensor:
    """Rows of the parameter that get a gradient."""
    loss = weighted_sum(mixer, x, torch.randn_like(x))
    (gradient,) = torch.autograd.grad(loss, [parameter], allow_unused=True)
    if gradient is None:
        return torch.zeros(len(parameter), dtype=torch.bool, device=parameter.device)
    return (gradient != 0).flatten(1).any(1)


@torch.no_grad()
def _changes(mixer: Mixer, x: Tensor, parameter: nn.Parameter, rows: Tensor) -> bool:
    """Whether NaN in these rows changes the output; the parameter ends as it was."""
    before, values = mixer(x).y, parameter[rows].clone()
    parameter[rows] = float("nan")
    after = mixer(x).y
    parameter[rows] = values
    return not torch.equal(before, after)
