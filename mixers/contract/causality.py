"""Outputs depend on the past only: found by changing the future, as gradients miss hard choices such as top-k."""

from __future__ import annotations

import torch

from mixers.contract.errors import NotApplicable
from mixers.contract.subject import Subject, chunk_size, n_tokens_to_try, require_same


def causality(subject: Subject) -> None:
    """Other tokens from t on change no output before t, for every t."""
    mixer = subject.build()
    if not mixer.traits.causal:
        raise NotApplicable("declared as not causal")
    n_tokens = n_tokens_to_try(mixer)
    x = subject.tokens(mixer, 2, n_tokens)
    with torch.no_grad():
        y = mixer(x).y
        for t in range(1, n_tokens):
            changed = x.clone()
            changed[:, t:] = 3 * torch.randn_like(changed[:, t:])
            require_same(mixer(changed).y[:, :t], y[:, :t], f"output before token {t}, when tokens from {t} on change")


def nan_in_future(subject: Subject) -> None:
    """NaN from t on leaves every output before t as it was; t is at a chunk's start where there is ``chunk_size``.

    Within one chunk a masked product may spread it, as 0 * NaN is NaN.
    """
    mixer = subject.build()
    if not mixer.traits.causal:
        raise NotApplicable("declared as not causal")
    chunk = chunk_size(mixer)
    n_tokens = 3 * chunk if chunk else 13
    starts = range(chunk, n_tokens, chunk) if chunk else range(1, n_tokens)
    x = subject.tokens(mixer, 2, n_tokens)
    with torch.no_grad():
        y = mixer(x).y
        for t in starts:
            spoilt = x.clone()
            spoilt[:, t:] = float("nan")
            require_same(mixer(spoilt).y[:, :t], y[:, :t], f"output before token {t}, when tokens from {t} on are NaN")
