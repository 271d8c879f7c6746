"""The state's size: as declared, measured on its tensors."""

from __future__ import annotations

import torch

from mixers.base import Mixer, detach_state, state_bytes, state_tensors
from mixers.contract.errors import ContractError, NotApplicable
from mixers.contract.subject import Subject, chunk_size, n_tokens_to_try

GROWTHS = ("none", "constant", "linear", "window")
# A window that isn't an option called ``window`` is expected to be full after so many tokens.
WINDOW_TOKENS = 64


def state_growth(subject: Subject) -> None:
    """State bytes grow with T as declared, and what is stored never exceeds them.

    ``constant``: equal at all T, or at all T of equal distance from the last whole chunk where there is
    ``chunk_size``. ``linear``: by the same amount for each chunk or token. ``window``: up to a bound.
    """
    mixer = subject.build(subject.storage_dtype)
    growth = mixer.state_growth
    if growth not in GROWTHS:
        raise ContractError(f"declared growth {growth!r} isn't one of {', '.join(GROWTHS)}")
    period = chunk_size(mixer) or 1
    sizes: dict[int, int] = {}

    def at(n_tokens: int) -> int:
        sizes[n_tokens] = _bytes(subject, mixer, 2, n_tokens)
        return sizes[n_tokens]

    if growth == "none":
        ok = at(0) == at(1) == at(17) == 0
    elif growth == "constant":
        ok = all(at(period + k) == at(3 * period + k) == at(8 * period + k) > 0 for k in (0, 3 % period))
    elif growth == "linear":
        step = at(2 * period) - at(period)
        ok = at(3 * period) - at(2 * period) == step > 0 and at(13 * period) - at(3 * period) == 10 * step
    else:
        full = period * -(-(getattr(mixer.config, "window", None) or WINDOW_TOKENS) // period)
        ok = at(1) < at(full) == at(2 * full) == at(3 * full)
    if not ok:
        measured = ", ".join(f"{n_bytes:,} at T={n}" for n, n_bytes in sorted(sizes.items()))
        raise ContractError(f"declared growth {growth!r}, measured bytes of two sequences: {measured}")


def state_scope(subject: Subject) -> None:
    """Scope ``sequence``: every sequence adds the same bytes. Scope ``shared``: none."""
    mixer = subject.build(subject.storage_dtype)
    if mixer.state_growth == "none":
        raise NotApplicable("declared without a state")
    if mixer.state_scope not in ("sequence", "shared"):
        raise ContractError(f"declared scope {mixer.state_scope!r} is neither 'sequence' nor 'shared'")
    n_tokens = 8 * (chunk_size(mixer) or 1)
    one, two, three = (_bytes(subject, mixer, n, n_tokens) for n in (1, 2, 3))
    added = (two - one, three - two)
    if added[0] != added[1] or (added[0] > 0) != (mixer.state_scope == "sequence"):
        raise ContractError(
            f"declared scope {mixer.state_scope!r}, but the second and third sequence add {added[0]:,} and "
            f"{added[1]:,} bytes"
        )


def state_storage(subject: Subject) -> None:
    """A detached state keeps no more memory alive than its own bytes: no views into large buffers."""
    mixer = subject.build(subject.storage_dtype)
    if mixer.state_growth == "none":
        raise NotApplicable("declared without a state")
    for n_tokens in (1, n_tokens_to_try(mixer), 3 * (chunk_size(mixer) or 8)):
        state = detach_state(mixer(subject.tokens(mixer, 2, n_tokens, subject.storage_dtype), return_state=True).state)
        # Tensors of the module itself are kept alive by it: a state that shares them costs nothing.
        own = {tensor.untyped_storage().data_ptr() for tensor in (*mixer.parameters(), *mixer.buffers())}
        kept = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in state_tensors(state)}
        n_kept = sum(n_bytes for pointer, n_bytes in kept.items() if pointer not in own)
        n_own = state_bytes(state)
        if n_kept > n_own:
            raise ContractError(
                f"memory kept alive by a state of {n_own:,} bytes (clone what is cut from larger tensors) exceeds it",
                position=f"T={n_tokens}",
                size=n_kept - n_own,
            )


def _bytes(subject: Subject, mixer: Mixer, n_sequences: int, n_tokens: int) -> int:
    """The state's size by the mixer's ``full_state_bytes``. What it holds in floating point must be part of that."""
    with torch.no_grad():
        state = mixer(subject.tokens(mixer, n_sequences, n_tokens, subject.storage_dtype), return_state=True).state
    counted = mixer.full_state_bytes(state)
    stored = state_bytes([part for part in state_tensors(state) if part.is_floating_point()])
    if stored > counted:
        raise ContractError(
            f"full_state_bytes counts {counted:,} bytes of a state that stores {stored:,}", position=f"T={n_tokens}"
        )
    return counted
