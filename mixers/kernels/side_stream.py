"""A second stream for work that need not wait for the current one; it can be captured in a CUDA graph."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch


@cache
def _stream(device_index: int) -> torch.cuda.Stream:
    # Above the current stream: its kernels are small and each waits for the one before it.
    return torch.cuda.Stream(device_index, priority=-1)


class SideStream:
    """Runs beside the stream that is current here, once :meth:`wait` was called; without a GPU there is one order only.

    Tensors must be allocated on the current stream before a :meth:`wait`, and kept until after the last :meth:`join`.
    """

    def __init__(self, device: torch.device, *, beside: bool = True) -> None:
        self._side = self._main = None
        if beside and device.type == "cuda":
            self._main = torch.cuda.current_stream(device)
            self._side = _stream(self._main.device_index)

    def run(self) -> AbstractContextManager:
        """What is launched in this context runs on the side stream."""
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def wait(self) -> None:
        """The side stream goes on after all that the current stream was given so far."""
        if self._side is not None:
            self._side.wait_stream(self._main)

    def join(self) -> None:
        """The current stream goes on after all that the side stream was given so far."""
        if self._side is not None:
            self._main.wait_stream(self._side)
