"""Where a chunk's tokens lie in the call's tensors."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def token_of(query, memory, n_rows, n_chunk, n_tokens, start):
    """Index of a memory's query s = r*C + c among all M*R*T tokens: (m*R + r)*T + start + c."""
    row = memory.to(tl.int64) * n_rows + query // n_chunk
    return row * n_tokens + start + query % n_chunk
