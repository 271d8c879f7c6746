"""A healthy mixer that is defined by chunks, and faults that show across a chunk's border only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mixers.base import Mixer, MixerOutput, Traits
from mixers.config import MixerConfig
from mixers.masking import zero_padding
from tests.mixers.contract.faulty import caught_by


class ChunkedSumState(NamedTuple):
    """memory (B,D), the sum over all full chunks; waiting (B,W,D), the inputs of the unfinished one."""

    memory: Tensor
    waiting: Tensor


class ChunkedSumConfig(MixerConfig):
    chunk_size: int = Field(6, gt=0)


class ChunkedSum(Mixer):
    """y_t = W (x_t + tanh(s)), s the sum of the inputs of all chunks before that of t."""

    Config = ChunkedSumConfig
    traits = Traits(state_growth="constant", exact_chunking=False)
    family, source = "recurrence", "here"

    def __init__(self, config: ChunkedSumConfig) -> None:
        super().__init__(config)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.out.weight, std=self.out.in_features**-0.5)

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> ChunkedSumState:
        memory = torch.zeros(batch_size, self.config.d_model, device=device, dtype=dtype)
        return ChunkedSumState(memory, memory.new_zeros(batch_size, 0, self.config.d_model))

    def forward(
        self,
        x: Tensor,
        state: ChunkedSumState | None = None,
        *,
        return_state: bool = False,
        mask: Tensor | None = None,
    ) -> MixerOutput:
        x = zero_padding(x, mask)
        if state is None:
            state = self.initial_state(x.shape[0], device=x.device, dtype=x.dtype)
        inputs = torch.cat([state.waiting, x], dim=1)
        memory, rows = state.memory, []
        for part in inputs.split(self.config.chunk_size, dim=1):
            rows.append(self.read(part, memory))
            if self.is_written(part):
                memory = memory + part.sum(1)
        rest = inputs[:, inputs.shape[1] - inputs.shape[1] % self.config.chunk_size :]
        y = zero_padding(self.out(torch.cat(rows, dim=1)[:, state.waiting.shape[1] :]), mask)
        return MixerOutput(y, ChunkedSumState(memory, self.kept(rest)) if return_state else None, {})

    def read(self, part: Tensor, memory: Tensor) -> Tensor:
        return part + torch.tanh(memory)[:, None]

    def is_written(self, part: Tensor) -> bool:
        return part.shape[1] == self.config.chunk_size

    def kept(self, rest: Tensor) -> Tensor:
        return rest.clone()

    def flops_per_token(self, context: int) -> float:
        return 2.0 * self.config.d_model**2


@caught_by("causality")
class SeesItsChunk(ChunkedSum):
    def read(self, part, memory):
        return super().read(part, memory) + part.mean(1, keepdim=True)


@caught_by("cuts")
class WritesUnfinishedChunk(ChunkedSum):
    def is_written(self, part):
        return True


@caught_by("cuts")
class WaitingWithoutGradient(ChunkedSum):
    def kept(self, rest):
        return rest.detach().clone()


@caught_by("state_storage")
class WaitingIsAView(ChunkedSum):
    def kept(self, rest):
        return rest


@caught_by("state_growth")
class KeepsAllChunks(ChunkedSum):
    """The state also holds every input seen, so that its bytes grow with every chunk."""

    def forward(self, x, state=None, *, return_state=False, mask=None):
        inner, seen = state or self.initial_state(x.shape[0], device=x.device, dtype=x.dtype)
        out = super().forward(x, inner, return_state=return_state, mask=mask)
        return out._replace(state=(out.state, torch.cat([seen, x], dim=1)) if return_state else None)

    def initial_state(self, batch_size, *, device, dtype):
        inner = ChunkedSum.initial_state(self, batch_size, device=device, dtype=dtype)
        return inner, inner.waiting.clone()


@caught_by("padding")
class PaddingIsWritten(ChunkedSum):
    def forward(self, x, state=None, *, return_state=False, mask=None):
        return super().forward(x, state, return_state=return_state)
