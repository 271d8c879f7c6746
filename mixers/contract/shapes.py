"""Shapes and dtypes of what forward returns."""

from __future__ import annotations

import torch

from mixers.base import MixerOutput
from mixers.contract.errors import ContractError
from mixers.contract.subject import Subject, n_tokens_to_try, require_finite


def shapes(subject: Subject) -> None:
    """y has the shape and dtype of x for T = 0, 1, odd and long; aux holds finite scalars; no state unless asked."""
    wide = (torch.float32, torch.float64) if subject.dtype == torch.float64 else (subject.dtype,)
    for dtype in dict.fromkeys((*wide, torch.bfloat16)):
        mixer = subject.build(dtype)
        for n_tokens in (0, 1, 13, 2 * n_tokens_to_try(mixer) + 1):
            where = f"T={n_tokens}, {dtype}"
            x = subject.tokens(mixer, 3, n_tokens, dtype)
            out = mixer(x)
            if not isinstance(out, MixerOutput):
                raise ContractError(f"forward returned {type(out).__name__}, not MixerOutput", position=where)
            if out.y.shape != x.shape or out.y.dtype != dtype:
                raise ContractError(
                    f"y is {tuple(out.y.shape)} {out.y.dtype} instead of {tuple(x.shape)} {dtype}", position=where
                )
            require_finite(out.y, f"y at {where}")
            for name, value in out.aux.items():
                if value.ndim:
                    raise ContractError(f"aux[{name!r}] has shape {tuple(value.shape)}, not ()", position=where)
                require_finite(value, f"aux[{name!r}] at {where}")
            if out.state is not None:
                raise ContractError("a state was returned without return_state=True", position=where)
            if mixer(x[:, :0], return_state=True).y.shape != x[:, :0].shape:
                raise ContractError("y of no tokens isn't empty when the state is asked for", position=where)
