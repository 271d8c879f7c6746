"""Where a chunk's tokens lie in the call's tensors."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Chunk(NamedTuple):
    """One chunk of a call: tokens start .. start + n_chunk of each of the M*R sequences of n_tokens tokens."""

    n_memories: int
    n_rows: int
    n_tokens: int
    start: int
    n_chunk: int

    @property
    def n_queries(self) -> int:
        """S: the tokens of one memory in this chunk."""
        return self.n_rows * self.n_chunk

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What :func:`token_of` needs, in its order."""
        return self.n_rows, self.n_chunk, self.n_tokens, self.start


@triton.jit
def token_of(query, memory, n_rows, n_chunk, n_tokens, start):
    """Index of a memory's query s = r*C + c among all M*R*T tokens: (m*R + r)*T + start + c."""
    row = memory.to(tl.int64) * n_rows + query // n_chunk
    return row * n_tokens + start + query % n_chunk
