"""What a check works on: a way to build the mixer, and the inputs to try it with."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mixers.base import Mixer, State, state_tensors
from mixers.contract.errors import ContractError

# Tokens that a check needs at least, and those behind the last whole chunk, so that lengths are odd.
MIN_TOKENS, TAIL_TOKENS = 21, 5
# How far two ways to the same number may be apart. In float64 by rounding only; a kernel that works in float32 may
# multiply in TF32 (10 bits), one in bfloat16 rounds every operand to 8.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-2, torch.bfloat16: 5e-2}


class Subject:
    """A mixer under test: rebuilt afresh for each check, always from the same seed, on ``device`` and in ``dtype``.

    ``dtype`` is float64 wherever the implementation can compute in it: there every limit is rounding.
    """

    def __init__(
        self,
        build: Callable[[], Mixer],
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self._build = build
        self.seed = seed
        self.device = torch.device(device)
        self.dtype = dtype

    @property
    def storage_dtype(self) -> torch.dtype:
        """What states are weighed in: float32, as in training, unless the mixer works in less."""
        return torch.float32 if self.dtype == torch.float64 else self.dtype

    def build(self, dtype: torch.dtype | None = None, seed: int = 0) -> Mixer:
        """The mixer in ``dtype`` (the subject's unless given), initialised from this subject's seed and ``seed``.

        In evaluation where it declares ``batch_statistics``: training is not meant to keep the rules on tokens.
        """
        torch.manual_seed(1000 * self.seed + seed)
        mixer = self._build().to(self.device, self.dtype if dtype is None else dtype)
        return mixer.eval() if mixer.batch_statistics else mixer

    def readable(self, dtype: torch.dtype | None = None) -> Mixer:
        """The twin with ``impl='reference'``, of the same weights; the mixer itself where that is no option."""
        dtype = self.dtype if dtype is None else dtype
        mixer = self.build(dtype)
        if "impl" not in type(mixer.config).model_fields or mixer.config.impl == "reference":
            return mixer
        values = {**mixer.config.model_dump(), "impl": "reference"}
        twin = type(mixer)(type(mixer.config).parse(values, "contract")).to(self.device, dtype)
        twin.load_state_dict(mixer.state_dict())
        return twin.train(mixer.training)

    def tokens(self, mixer: Mixer, n_sequences: int, n_tokens: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal inputs (B,T,D) that depend on the subject's seed and their shape only."""
        torch.manual_seed(zlib.crc32(f"{self.seed},{n_sequences},{n_tokens}".encode()))
        drawn = torch.randn(n_sequences, n_tokens, mixer.config.d_model, dtype=torch.float64)
        return drawn.to(self.device, self.dtype if dtype is None else dtype)

    def mask(self, n_sequences: int, n_tokens: int) -> Tensor:
        """A mask (B,T) that masks nothing."""
        return torch.ones(n_sequences, n_tokens, dtype=torch.bool, device=self.device)


def chunk_size(mixer: Mixer) -> int | None:
    """The option ``chunk_size``, where a mixer has one: outputs and states may follow it."""
    return getattr(mixer.config, "chunk_size", None)


def n_tokens_to_try(mixer: Mixer) -> int:
    """A length that crosses two chunks and ends inside a third."""
    return max(MIN_TOKENS, 2 * (chunk_size(mixer) or 0) + TAIL_TOKENS)


def run_in_parts(
    mixer: Mixer, x: Tensor, lengths: Sequence[int], mask: Tensor | None = None, state: State = None
) -> tuple[Tensor, State]:
    """y and the state after calls with ``lengths`` tokens each."""
    ys, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        y, state, _ = mixer(x[:, part], state, return_state=True, mask=None if mask is None else mask[:, part])
        ys.append(y)
        start += length
    return torch.cat(ys, dim=1), state


def weighted_sum(mixer: Mixer, x: Tensor, weights: Tensor) -> Tensor:
    """A scalar to differentiate: sum of weights * y, and whatever the mixer adds to the training loss."""
    out = mixer(x)
    return (out.y * weights).sum() + sum(value for name, value in out.aux.items() if name.startswith("loss/"))


def difference(found: Tensor, expected: Tensor) -> tuple[float, tuple[int, ...]]:
    """The largest absolute difference and its index; NaN on either side counts as infinite."""
    if found.numel() == 0:
        return 0.0, ()
    gap = (found.detach().double() - expected.detach().double()).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    flat = int(gap.argmax())
    return float(gap.max()), tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), gap.shape))


def require_same(found: Tensor, expected: Tensor, what: str, limit: float | None = None) -> None:
    """Raise unless both are equal to ``limit`` (that of their dtype unless given).

    It is relative to the largest expected value: in float64 to that above 1, where less is noise anyway; in less
    precision to any.
    """
    if found.shape != expected.shape:
        raise ContractError(f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    if found.dtype != expected.dtype:
        raise ContractError(f"{what}: {found.dtype} instead of {expected.dtype}")
    if found.numel() == 0:
        return
    size, index = difference(found, expected)
    limit = LIMITS.get(expected.dtype, 0.0) if limit is None else limit
    largest = float(expected.detach().double().abs().nan_to_num(0.0, 0.0, 0.0).max())
    allowed = limit * (max(1.0, largest) if expected.dtype == torch.float64 else largest)
    if not size <= allowed:
        raise ContractError(f"{what}, differs", position=place(index), size=size, allowed=allowed)


def require_same_state(found: State, expected: State, what: str) -> None:
    """Raise unless two states hold equal tensors."""
    got, want = state_tensors(found), state_tensors(expected)
    if len(got) != len(want):
        raise ContractError(f"{what}: {len(got)} tensors instead of {len(want)}")
    for i, (left, right) in enumerate(zip(got, want, strict=True)):
        require_same(left, right, f"{what}, tensor {i}")


def require_finite(values: Tensor, what: str) -> None:
    """Raise at the first NaN or infinity."""
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        raise ContractError(f"{what}: {len(bad)} values aren't finite", position=place(tuple(bad[0].tolist())))


def place(index: tuple[int, ...]) -> str:
    """An index in words; three dimensions are sequence, token, channel."""
    if len(index) == 3:
        return f"sequence {index[0]}, token {index[1]}, channel {index[2]}"
    return f"index {index}" if index else ""
