"""Cut the tokens into chunks of equal length, with as little padding as possible."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def chunk_plan(n_tokens: int, chunk_size: int) -> tuple[int, int]:
    """Number of chunks and their length, at most ``chunk_size``: fewer padded tokens than there are chunks.

    T = 129 at chunk_size 64 becomes 3 chunks of 43, not 3 of 64; T = 1 becomes one chunk of 1.
    """
    n_chunks = max(1, -(-n_tokens // chunk_size))
    return n_chunks, -(-n_tokens // n_chunks)


def split_chunks(x: Tensor, n_chunks: int, length: int) -> Tensor:
    """(B,T,H,...) -> (B,H,n,C,...), zeros behind the last token."""
    n_missing = n_chunks * length - x.shape[1]
    if n_missing:
        x = functional.pad(x, (0, 0) * (x.ndim - 2) + (0, n_missing))
    return x.unflatten(1, (n_chunks, length)).movedim(3, 1)


def join_chunks(x: Tensor, n_tokens: int) -> Tensor:
    """(B,H,n,C,V) -> (B,T,H,V), without what lies behind the last token."""
    return x.movedim(1, 3).flatten(1, 2)[:, :n_tokens]


def chunk_spans(n_waiting: int, n_tokens: int, chunk_size: int) -> list[tuple[int, int]]:
    """(start, stop) of the runs of new tokens that share a chunk, when ``n_waiting`` < C came in earlier calls.

    2 tokens waiting, 7 new ones, C = 4: (0,2), (2,6), (6,7). Only the last span may leave its chunk unfinished.
    """
    if n_tokens == 0:
        return []
    starts = [0, *range(chunk_size - n_waiting, n_tokens, chunk_size)]
    return list(zip(starts, [*starts[1:], n_tokens], strict=True))
