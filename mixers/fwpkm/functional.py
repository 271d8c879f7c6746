"""The functional entry point of fast-weight product-key memory: checks its arguments, picks the implementation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mixers.errors import UserError
from mixers.fwpkm.reference import ChunkOptions, write_chunks
from mixers.fwpkm.sparse import SparseOutput, why_not_sparse, write_chunks_sparsely
from mixers.fwpkm.touched_rows import overlay
from mixers.fwpkm.unchanged import changes, require_unchanged
from mixers.implementations import TRITON_INSTALL, TRITON_MISSING
from mixers.product_keys import Score

Scope = Literal["sequence", "shared"]
UpdateScale = Literal["paper", "released"]
IMPLEMENTATIONS = ("auto", "reference", "sparse", "triton")
# In scope ``sequence`` a memory that goes on after a call of the Triton kernels is a whole table for every sequence;
# the readable path makes passes over such copies in every call, so it gives way to ``sparse`` much earlier.
LARGEST_TRITON_TABLE_BYTES = 2 * 2**30
LARGEST_REFERENCE_TABLE_BYTES = 32 * 2**20


class FastWeightOutput(NamedTuple):
    """read (B,T,V); the memory after the call, keys (H,2,n,K/2) and values (N,V), with a leading B in scope
    ``sequence``; slots (B,T,H,k) int64 and weights (B,T,H,k) of every read; value_loss and address_loss ()."""

    read: Tensor
    keys: Tensor
    values: Tensor
    slots: Tensor
    weights: Tensor
    value_loss: Tensor
    address_loss: Tensor


def fast_weight_pkm(
    q: Tensor,
    v: Tensor,
    gate: Tensor | None,
    keys: Tensor,
    values: Tensor,
    *,
    chunk_size: int,
    top_k: int,
    lookahead: int = 1,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    score: Score = "idw",
    activation: Literal["softmax"] = "softmax",
    temperature: float = 1.0,
    address_weight: float = 1.0,
    value_loss_to_keys: bool = False,
    clip: bool = False,
    mask: Tensor | None = None,
    scope: Scope = "shared",
    update_scale: UpdateScale = "paper",
    impl: str = "auto",
) -> FastWeightOutput:
    """Read a product-key memory chunk by chunk and write each chunk into it (Zhao & Jones 2026, arXiv:2601.00671).

    Within a chunk of C tokens all reads see the memory as it was before the chunk:

        a_t = softmax over the H*k best slots jointly (scores / temperature);  read_t = sum_j a_tj values[slot_tj]

    Then, with e_t = gate_t mask_t (read_t - v_{t+L}) for the pairs (t, t+L) inside the chunk,

        values_u <- values_u - lr * scale / cnt_u * sum_{(t,j)->u} a_tj e_t

    where cnt_u counts how often the chunk's tokens (all of them) accessed slot u; scale = 1 (``paper``) or
    H k ns / M (``released``; M pairs of the chunk, ns its tokens or, with a mask, its unmasked pairs). The sub-keys
    descend the negative marginal entropy of their own use, A = address_weight * sum_i Pbar_i log(Pbar_i + 1e-8)
    per half. A trailing chunk shorter than C is written too; tokens that must wait for more belong to the caller.

    Args:
        q: queries (B,T,H,K), K even. v: targets (B,T,V). gate: weight of each pair's loss (B,T), None for 1.
        keys: sub-keys (H,2,n,K/2). values: (n*n,V). In scope ``sequence`` every sequence starts from these, or from
            its own when they carry a leading B.
        chunk_size: C. top_k: k <= n slots read per head. lookahead: L; the last L tokens of a chunk write nothing.
        lr, weight_decay: of the write, p <- p - lr * (gradient + weight_decay * p). clip: gradient to +-1 first.
        value_loss_to_keys: whether 0.5 * mean_pairs[gate mask mean_V (read - v)^2] also moves the keys.
        mask: (B,T) bool or 0/1; False keeps pair (t, t+L) from being written. It does not change reads, counts or
            the addressing loss.
        scope: ``sequence``, one memory per sequence; ``shared``, all sequences read and write one.
        impl: ``reference``; ``sparse``, the same without passes over the table, for no weight_decay; ``triton``,
            kernels for CUDA in float32; or ``auto``, see :func:`choose_impl`.

    Gradients flow into q, v, gate, keys and values through every write of the call; the choice of slots is constant.
    ``value_loss`` and ``address_loss`` are means over the call's pairs and chunks; they are for logging and belong
    to the writes: add neither to a training loss.

    Raises:
        UserError: for shapes, types or options that don't fit, naming the argument and its value; and when the
            implementation asked for can't run here.

    Differences from the released code: the write's scale is the paper's by default; scope ``sequence`` exists; and
    results do not depend on how a sequence is cut into calls at chunk boundaries.
    """
    options = ChunkOptions(
        chunk_size=chunk_size,
        top_k=top_k,
        lookahead=lookahead,
        lr=lr,
        weight_decay=weight_decay,
        score=score,
        temperature=temperature,
        address_weight=address_weight,
        value_loss_to_keys=value_loss_to_keys,
        clip=clip,
        update_scale=update_scale,
    )
    _check(q, v, gate, keys, values, mask, scope, activation, options)
    n_sequences, n_tokens, n_heads, _ = q.shape
    # A memory is used by R sequences: all of them (shared), or one each (sequence).
    n_memories = n_sequences if scope == "sequence" else 1
    resolved = choose_impl(
        impl, options, values.shape[-2:], scope=scope, device=q.device, dtype=q.dtype, place="fast_weight_pkm"
    )
    if resolved == "sparse":
        return _sparse(q, v, gate, keys, values, mask, n_memories, scope, options)

    if keys.ndim == 4:
        keys = keys.expand(n_memories, *keys.shape)
        values = values.expand(n_memories, *values.shape)
    q_rows, v_rows, gate_rows, mask_rows = (_per_memory(tensor, n_memories) for tensor in (q, v, gate, mask))
    tokens = (q_rows, v_rows, gate_rows, keys, values, mask_rows)
    if resolved == "triton":
        # Not at the top: triton is optional, and slow to import.
        from mixers.fwpkm.triton_chunks import write_chunks as write_by_kernels

        out = write_by_kernels(*tokens, options)
        kind, new_values = _LazyOutput, _LaterTable(out.values.table, scope)
    else:
        out = write_chunks(*tokens, options)
        kind, new_values = FastWeightOutput, out.values if scope == "sequence" else out.values[0]
    shape = (n_sequences, n_tokens)
    return kind(
        out.read.reshape(*shape, v.shape[-1]),
        out.keys if scope == "sequence" else out.keys[0],
        new_values,
        out.slots.reshape(*shape, n_heads, top_k),
        out.weights.reshape(*shape, n_heads, top_k),
        out.value_loss.detach(),
        out.address_loss.detach(),
    )


def read_and_forget(
    q: Tensor, v: Tensor, gate: Tensor | None, keys: Tensor, values: Tensor, mask: Tensor | None, options: ChunkOptions
) -> FastWeightOutput:
    """:func:`fast_weight_pkm` by ``triton`` where nobody wants the memory afterwards: keys and values are None, and the
    last chunk only reads and has no part in the losses. keys (M,H,2,n,K/2) and values (M,N,V): M = B, or 1 (shared)."""
    # Not at the top: triton is optional, and slow to import.
    from mixers.fwpkm.triton_chunks import write_chunks as write_by_kernels

    rows = [_per_memory(tensor, keys.shape[0]) for tensor in (q, v, gate, mask)]
    out = write_by_kernels(*rows[:3], keys, values, rows[3], options, goes_on=False)
    by_head = (*q.shape[:3], options.top_k)
    return FastWeightOutput(
        out.read.view(v.shape), None, None, out.slots.view(by_head), out.weights.view(by_head),
        out.value_loss.detach(), out.address_loss.detach(),
    )  # fmt: skip


def _per_memory(tensor: Tensor | None, n_memories: int) -> Tensor | None:
    """(B,...) as (M,R,...), the R sequences of each memory together."""
    return None if tensor is None else tensor.reshape(n_memories, tensor.shape[0] // n_memories, *tensor.shape[1:])


def _sparse(
    q: Tensor,
    v: Tensor,
    gate: Tensor | None,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    n_memories: int,
    scope: str,
    options: ChunkOptions,
) -> FastWeightOutput:
    """The sparse implementation; the whole tables are put together from what was touched when they are asked for."""
    base = values.unsqueeze(0) if values.ndim == 2 else values
    if keys.ndim == 4:
        keys = keys.expand(n_memories, *keys.shape)
    codes, rows = empty_rows(base)
    out = write_chunks_sparsely(q, v, gate, keys, base, codes, rows, mask, q.shape[1], options)
    by_head = (*q.shape[:3], options.top_k)
    return _LazyOutput(
        out.read,
        out.keys if scope == "sequence" else out.keys[0],
        _LaterTable(_Joined(base, out, n_memories), scope),
        out.slots.view(by_head),
        out.weights.view(by_head),
        out.value_loss,
        out.address_loss,
    )


class _LaterTable:
    """The values after a call, made on first use by ``make``: (M,N,V), of which scope ``shared`` has one."""

    def __init__(self, make: Callable[[], Tensor], scope: str) -> None:
        self._make, self._scope = make, scope
        # Wherever it is asked for, it is part of the graph of its call.
        self._grad_enabled = torch.is_grad_enabled()
        self._made: Tensor | None = None

    def made(self) -> Tensor:
        if self._made is None:
            with torch.set_grad_enabled(self._grad_enabled):
                tables = self._make()
                self._made = tables if self._scope == "sequence" else tables[0]
            del self._make
        return self._made


class _Joined:
    """The given table and the rows that differ from it, joined when called."""

    def __init__(self, base: Tensor, out: SparseOutput, n_memories: int) -> None:
        self._base, self._out, self._n_memories = base, out, n_memories
        self._seen = changes(base)

    def __call__(self) -> Tensor:
        require_unchanged("values", self._base, self._seen)
        return overlay(self._base, self._out.codes, self._out.rows, self._n_memories)


class _LazyOutput(FastWeightOutput):
    """A FastWeightOutput whose ``values``, a copy of the whole table, is made only when read: that costs more than
    the call itself when the table is large."""

    @property
    def values(self) -> Tensor:
        return self[2]

    def __getitem__(self, index: int | slice) -> Any:
        return tuple(self)[index] if isinstance(index, slice) else _made(super().__getitem__(index))

    def __iter__(self) -> Iterator[Tensor]:
        return (_made(item) for item in super().__iter__())


def _made(item: Tensor | _LaterTable) -> Tensor:
    return item.made() if isinstance(item, _LaterTable) else item


def empty_rows(base: Tensor) -> tuple[Tensor, Tensor]:
    """codes (0,) and rows (0,V): nothing differs from ``base`` (...,V) yet."""
    return torch.empty(0, dtype=torch.int64, device=base.device), base.new_empty(0, base.shape[-1])


def choose_impl(
    impl: str,
    options: ChunkOptions,
    table_shape: tuple[int, int],
    *,
    scope: str,
    device: torch.device,
    dtype: torch.dtype,
    place: str,
) -> str:
    """The implementation that runs for ``impl`` on ``device``: ``reference``, ``sparse`` or ``triton``.

    ``auto`` on CUDA: ``triton`` where it has kernels for the options, sizes and dtype, unless in scope ``sequence`` a
    state would hold a table (N,V) of more than 2 GiB for every sequence; else ``reference``, which on an H200 was up to
    1.5 times faster than ``sparse`` (n from 32 to 512, K = V from 64 to 512), or ``sparse`` where scope ``sequence``
    would copy more than 32 MiB for every sequence. Elsewhere it goes by :func:`resolve_impl`. It depends neither on B
    nor on T: many sequences with large tables may need ``impl="sparse"`` to fit the card.

    Raises:
        UserError: an unknown name; or ``triton`` without its package or a kernel, naming ``place`` and the reason.
    """
    require_impl(impl)
    n_slots, value_dim = table_shape
    if impl == "triton":
        why = _why_not_triton(options, math.isqrt(n_slots), value_dim, device, dtype)
        if why:
            raise UserError(
                f"{place}: impl='triton' can't run here: {why}; or use impl='auto', 'sparse' or 'reference'"
            )
        return "triton"
    if impl != "auto" or device.type != "cuda":
        return resolve_impl(impl, options)
    copied_bytes = n_slots * value_dim * dtype.itemsize if scope == "sequence" else 0
    if copied_bytes <= LARGEST_TRITON_TABLE_BYTES and not _why_not_triton(
        options, math.isqrt(n_slots), value_dim, device, dtype
    ):
        return "triton"
    return "sparse" if copied_bytes > LARGEST_REFERENCE_TABLE_BYTES and not why_not_sparse(options) else "reference"


@torch._disable_dynamo  # torch.compiler.disable imports the compiler at once, which takes seconds
def _why_not_triton(
    options: ChunkOptions, n_subkeys: int, value_dim: int, device: torch.device, dtype: torch.dtype
) -> str:
    """Why the Triton kernels can't run, and the way out; empty when they can."""
    if TRITON_MISSING:
        return f"the package triton is not installed; on Linux with an NVIDIA GPU: {TRITON_INSTALL}"
    # Not at the top: triton is optional, and slow to import.
    from mixers.fwpkm.triton_chunks import unsupported

    why = unsupported(device, dtype, n_subkeys, value_dim, options)
    return why and f"no kernel for {why}"


def resolve_impl(impl: str, options: ChunkOptions) -> str:
    """The implementation that ``impl`` stands for on a CPU: ``reference`` or ``sparse``.

    ``auto`` takes ``sparse`` wherever the options have a sparse form. Time of ``reference`` over that of ``sparse``,
    forward / forward and backward (the whole layer, 128 tokens, K = V, H = 1, k = 8, float32, one thread of an EPYC
    that others used too; medians of the processor times of 24 calls, the two in turn):

        B   n    V    C    scope sequence   scope shared
        64  32   64   16   2.33 / 2.28      2.01 / 1.49
        8   32   64   16   1.74 / 1.64
        2   32   64   16   1.39 / 1.40
        64  32   64   64   2.13 / 1.93      1.80 / 1.66
        8   32   64   64   1.41 / 1.42
        2   32   64   64   1.14 / 1.02
        8   32   128  64   2.22 / 1.33
        2   64   64   64   1.65 / 1.21

    By the smallest times the two are level at B = 2, n = 32, C = 64 (0.94 / 0.98): a call of two chunks, where the plan
    of the rows costs as much as passes over a small table. So ``auto`` needs no rule by B and T, which would give the
    calls of one run to different implementations.
    """
    require_impl(impl)
    if impl != "auto":
        return impl
    return "reference" if why_not_sparse(options) else "sparse"


def require_impl(impl: str) -> None:
    """Raise :class:`UserError` unless ``impl`` is a known name."""
    if impl not in IMPLEMENTATIONS:
        raise UserError(f"fast_weight_pkm: impl={impl!r} is not available; choose one of {', '.join(IMPLEMENTATIONS)}")


def _check(
    q: Tensor,
    v: Tensor,
    gate: Tensor | None,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scope: str,
    activation: str,
    options: ChunkOptions,
) -> None:
    def require(condition: bool, text: str) -> None:
        if not condition:
            raise UserError(f"fast_weight_pkm: {text}")

    require(q.ndim == 4, f"q must be (B,T,H,K), got {tuple(q.shape)}")
    n_sequences, n_tokens, n_heads, key_dim = q.shape
    require(key_dim % 2 == 0, f"the key width K must be even to be cut in halves, got K={key_dim}")
    require(n_sequences > 0, "q holds no sequences (B=0)")
    require(scope in ("sequence", "shared"), f"scope must be 'sequence' or 'shared', got {scope!r}")
    lead = (n_sequences,) if keys.ndim == 5 and scope == "sequence" else ()
    n_subkeys = keys.shape[-2] if keys.ndim >= 2 else 0
    want_keys = (*lead, n_heads, 2, n_subkeys, key_dim // 2)
    require(tuple(keys.shape) == want_keys, f"keys must be (H,2,n,K/2) = {want_keys}, got {tuple(keys.shape)}")
    value_dim = v.shape[-1]
    want_values = (*lead, n_subkeys**2, value_dim)
    require(tuple(values.shape) == want_values, f"values must be (n*n,V) = {want_values}, got {tuple(values.shape)}")
    for name, tensor, want in (
        ("v", v, (n_sequences, n_tokens, value_dim)),
        ("gate", gate, (n_sequences, n_tokens)),
        ("mask", mask, (n_sequences, n_tokens)),
    ):
        require(tensor is None or tuple(tensor.shape) == want, f"{name} must be {want}, got {_shape(tensor)}")
    dtypes = {tensor.dtype for tensor in (q, v, keys, values, *(() if gate is None else (gate,)))}
    require(
        len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64},
        f"q, v, gate, keys and values must all be float32 or all float64, got {sorted(map(str, dtypes))}",
    )
    o = options
    require(1 <= o.top_k <= n_subkeys, f"top_k must be within 1..n={n_subkeys}, got {o.top_k}")
    require(o.chunk_size >= 1, f"chunk_size must be at least 1, got {o.chunk_size}")
    require(o.lookahead >= 0, f"lookahead must be at least 0, got {o.lookahead}")
    require(o.temperature > 0, f"temperature must be positive, got {o.temperature}")
    require(o.score in ("idw", "dot"), f"score must be 'idw' or 'dot', got {o.score!r}")
    require(activation == "softmax", f"activation must be 'softmax', got {activation!r}")
    require(
        o.update_scale in ("paper", "released"), f"update_scale must be 'paper' or 'released', got {o.update_scale!r}"
    )


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
