"""Fast-weight product-key memory on a GPU: the chunks of a call as a few Triton kernels, backward included.

Same mathematics as :mod:`mixers.fwpkm.reference`, in an order of its own. Without ``value_loss_to_keys`` the keys never
depend on the values, so the call runs in three parts:

    A. key_chain: all chunks' addressing and addressing steps; combine: the slots and weights of all tokens
    B. one stable sort of all (chunk, slot) accesses
    C. value_chain: for every chunk, read and take the errors, step the rows that were read

The given table is not copied: a row that is stepped becomes a new *version*, a row of a tensor of its own, and only if
a later chunk reads it (:mod:`mixers.kernels.versions`). The table after the call is made of the given one, the versions
and each row's last step when it is asked for. Only a call without gradients and with more accesses than the table has
rows works in place, on a copy. Such a call of one sequence is cut into a few parts of many chunks: C of one part goes
beside A of the next, in one launch (:mod:`mixers.kernels.both_chains`).

The backward goes in the opposite order, from the versions that each chunk read and the keys that it used: C' and A'.
A chain is one launch: its programs go from chunk to chunk together and meet where a step needs what another wrote
(:mod:`mixers.kernels.barrier`). So the number of launches hardly depends on the number of chunks. Nothing waits for
the device on the host, or has a size that depends on data, so a call can be captured in a CUDA graph.

Cost at J = H*k slots a token, float32, beside inputs and outputs, with p the share of accesses whose row a later chunk
reads: forward about 4 ((1 + 2 p) J V + 5 V + 3 H K) bytes per token, backward as much again and 4 p J V more; kept for
the backward: J V + V + 2 H K elements per token and the keys of each chunk. The backward writes the derivatives of the
versions over the versions, unless the graph is kept or the table may still be asked for.

Differences from the reference: slots of equal score are taken lowest index first; sub-keys are ranked by products of
rows in two float16 parts (:mod:`mixers.kernels.parts`), so two sub-keys whose distances differ by less than about 1e-6
|q| |key| may swap; ``value_loss`` and ``address_loss`` carry no gradient.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixers.errors import UserError
from mixers.fwpkm.last_table import LastTable
from mixers.fwpkm.reference import ENTROPY_EPS, ChunkOptions
from mixers.kernels.address import combine
from mixers.kernels.both_chains import both_chains, have_room
from mixers.kernels.key_chain import KeyWork, key_chain
from mixers.kernels.key_chain_backward import key_chain_backward
from mixers.kernels.value_chain import ValueWork, value_chain
from mixers.kernels.value_chain_backward import value_chain_backward
from mixers.kernels.versions import Accesses, find_versions

# Of a long call in place: the share of the chunks left that the next part gets, and the fewest of a part.
PART_SHARE, LEAST_CHUNKS = 0.35, 32
MAX_SUBKEYS, MAX_TOP_K, MAX_VALUE_DIM = 1024, 32, 4096


def unsupported(device: torch.device, dtype: torch.dtype, n_subkeys: int, value_dim: int, options: ChunkOptions) -> str:
    """Why these options and sizes have no kernels here; empty when they have."""
    interpreted = triton.knobs.runtime.interpret
    if device.type != "cuda" and not interpreted:
        return f"tensors on {device.type}: the kernels run on cuda"
    for name in ("value_loss_to_keys", "clip", "weight_decay"):
        if getattr(options, name):
            return f"{name}={getattr(options, name)}"
    if n_subkeys > MAX_SUBKEYS:
        return f"n={n_subkeys} sub-keys per half (at most {MAX_SUBKEYS})"
    if options.top_k > MAX_TOP_K:
        return f"top_k={options.top_k} (at most {MAX_TOP_K})"
    if value_dim > MAX_VALUE_DIM:
        return f"value width {value_dim} (at most {MAX_VALUE_DIM})"
    if dtype != torch.float32 and not interpreted:
        return f"{str(dtype).removeprefix('torch.')} (float32 only)"
    return ""


class TritonOutput(NamedTuple):
    """As :class:`mixers.fwpkm.reference.ChunksOutput`, the values made when asked for; ``keys`` and ``values`` are None
    where the memory does not go on."""

    read: Tensor
    keys: Tensor | None
    values: LastTable | None
    slots: Tensor
    weights: Tensor
    value_loss: Tensor
    address_loss: Tensor


@torch.compiler.disable
def write_chunks(
    q: Tensor,
    v: Tensor,
    gate: Tensor | None,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    options: ChunkOptions,
    *,
    goes_on: bool = True,
) -> TritonOutput:
    """Read and write q (M,R,T,H,K), v (M,R,T,V), gate and mask (M,R,T) chunk by chunk into keys and values.

    Arguments and result as :func:`mixers.fwpkm.reference.write_chunks`: new tables, the given ones stay as they are.
    ``goes_on``: whether they are wanted. Without, the last chunk only reads and has no part in the losses.

    Raises:
        UserError: an option, size, dtype or device has no kernel.
    """
    why = unsupported(q.device, q.dtype, keys.shape[3], values.shape[-1], options)
    if why:
        raise UserError(f"fast_weight_pkm: impl='triton' has no kernel for {why}; use impl='auto' or 'reference'")
    inputs = (q, v, gate, keys, values)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        last = LastTable()
        read, new_keys, place, *rest = _WriteChunks.apply(*inputs, mask, options, last, goes_on)
        if place is not None:
            last.place = place
        return TritonOutput(read, new_keys, last if goes_on else None, *rest)
    last = LastTable()
    out, _ = _forward(q, v, gate, keys, values, mask, options, last, keep=False, goes_on=goes_on)
    return out


class _Kept(NamedTuple):
    """What the backward needs of a forward, besides its inputs. E = M*R*T*J accesses, n_chunks = ceil(T / C).

    keys (n_chunks,M,H,2,n,K/2): as each chunk used them. indices, measures, probabilities (M,R,T,H,2,k). pairs, slots,
    weights (M,R,T,J). read (M,R,T,V). mean (n_chunks,M,2,n), totals (n_chunks,M,H,2,n): of the keys' steps. table (1 or
    M,N,V), versions (E,V): the rows that were read. order to move: :class:`Accesses`.
    """

    keys: Tensor
    indices: Tensor
    measures: Tensor
    probabilities: Tensor
    pairs: Tensor
    slots: Tensor
    weights: Tensor
    read: Tensor
    mean: Tensor
    totals: Tensor
    table: Tensor
    versions: Tensor
    order: Tensor
    group: Tensor
    count: Tensor
    before: Tensor
    after: Tensor
    factor: Tensor
    move: Tensor

    @property
    def accesses(self) -> Accesses:
        return Accesses(*self[-len(Accesses._fields) :])


class _Part(NamedTuple):
    """What a call has for each token, (M,R,T,...), or for those of some of its chunks."""

    q: Tensor
    v: Tensor
    gate: Tensor | None
    mask: Tensor | None
    indices: Tensor
    measures: Tensor
    probabilities: Tensor
    pairs: Tensor
    slots: Tensor
    weights: Tensor
    read: Tensor
    squared_error: Tensor

    def tokens(self, here: slice) -> _Part:
        """Those of some tokens, views."""
        return _Part(*(None if tensor is None else tensor[:, :, here] for tensor in self))

    def values(
        self, table: Tensor, versions: Tensor | None, accesses: Accesses, error: Tensor | None, options: ChunkOptions
    ) -> ValueWork:
        """The work of the values' chain."""
        return ValueWork(
            table, versions, self.slots, self.weights, self.v, self.gate, self.mask, accesses, self.read,
            self.squared_error, error, options.chunk_size, options.lookahead,
        )  # fmt: skip


def _forward(
    q: Tensor,
    v: Tensor,
    gate: Tensor | None,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    options: ChunkOptions,
    last: LastTable,
    *,
    keep: bool,
    goes_on: bool,
) -> tuple[TritonOutput, _Kept | None]:
    """The results, ``last`` among them, and with ``keep`` what the backward needs."""
    o = options
    q, v = q.contiguous(), v.contiguous()
    gate, mask = (None if tensor is None else tensor.contiguous() for tensor in (gate, mask))
    n_memories, n_rows, n_tokens, n_heads, _ = q.shape
    n_slots, value_dim = values.shape[1:]
    n_subkeys, top_k = keys.shape[3], o.top_k
    tokens, n_read = (n_memories, n_rows, n_tokens), n_heads * top_k
    n_chunks = -(-n_tokens // o.chunk_size)
    n_kept_keys = n_chunks + 1 if keep and o.address_weight != 0 else 1
    all_keys = keys.new_empty(n_kept_keys, *keys.shape)
    all_keys[0] = keys
    read = q.new_empty(*tokens, value_dim)
    indices = torch.empty(*tokens, n_heads, 2, top_k, dtype=torch.int32, device=q.device)
    measures, probabilities = q.new_empty(indices.shape), q.new_empty(indices.shape)
    pairs = torch.empty(*tokens, n_read, dtype=torch.int32, device=q.device)
    slots = torch.empty(*tokens, n_read, dtype=torch.int64, device=q.device)
    weights = q.new_empty(*tokens, n_read)
    if not read.shape[:3].numel():
        nothing = q.new_zeros(())
        last.keep(values, n_memories, slots)
        return TritonOutput(read, all_keys[0], last, slots, weights, nothing, nothing.clone()), None

    # Without a step nothing is used, and the loss is 0.
    mean = (q.new_empty if o.address_weight else q.new_zeros)(n_chunks, n_memories, 2, n_subkeys)
    totals = q.new_empty(n_kept_keys - 1, *keys.shape[:-1])
    squared_error = q.new_empty(tokens)
    scale = _scale(q, mask, o)
    whole = _Part(q, v, gate, mask, indices, measures, probabilities, pairs, slots, weights, read, squared_error)
    in_place = not keep and slots.numel() > n_memories * n_slots
    if in_place:
        # Fewer rows than versions: a copy of the table, stepped in place.
        table = values.clone(memory_format=torch.contiguous_format)
        versions = error = None
        last = LastTable(table)
    else:
        table = (values[:1] if values.stride(0) == 0 else values).contiguous()
        versions, error = q.new_empty(slots.numel(), value_dim), torch.empty_like(read)
    in_parts = in_place and n_memories * n_rows == 1 and have_room(q)
    value_part = None
    chunks = slice(0, 0)
    for n_part in _part_sizes(n_chunks) if in_parts else [n_chunks]:
        chunks = slice(chunks.stop, chunks.stop + n_part)
        here = slice(chunks.start * o.chunk_size, min(chunks.stop * o.chunk_size, n_tokens))
        part = whole.tokens(here)
        key_part = KeyWork(
            part.q, all_keys, part.indices, part.measures, part.probabilities, mean[chunks], totals, o.chunk_size,
            o.score, o.lr, o.address_weight,
        )  # fmt: skip
        part_goes_on = goes_on or chunks.stop < n_chunks
        if value_part is None:
            key_chain(key_part, goes_on=part_goes_on)
        else:
            both_chains(key_part, value_part, goes_on=part_goes_on)
        combine(part.indices, part.measures, part.pairs, part.slots, part.weights, n_subkeys, o.score, o.temperature)
        accesses = find_versions(part.slots, part.weights, scale[chunks], n_slots, o.chunk_size)
        value_part = part.values(table, versions, accesses, error, o)
    if not in_place:
        last.keep(table, n_memories, slots, versions, error, accesses)
    value_chain(value_part)

    sizes = _sizes(n_tokens, o.chunk_size)
    if not goes_on:
        squared_error, mean, sizes = squared_error[:, :, : -sizes[-1]], mean[:-1], sizes[:-1]
    n_pairs = n_memories * n_rows * sum(max(size - o.lookahead, 0) for size in sizes)
    out = TritonOutput(
        read,
        # A copy where it is one of many: a state would keep the keys of all chunks alive.
        (all_keys[-1].clone() if n_kept_keys > 1 else all_keys[-1]) if goes_on else None,
        last if goes_on else None,
        slots,
        weights,
        squared_error.sum() * (0.5 / max(n_pairs, 1)),
        (torch.log(mean + ENTROPY_EPS) * mean).sum() * (o.address_weight / max(n_memories * len(sizes), 1)),
    )
    if not keep:
        return out, None
    kept = _Kept(
        all_keys,
        indices,
        measures,
        probabilities,
        pairs,
        slots,
        weights,
        read,
        mean,
        totals,
        table,
        versions,
        *accesses,
    )
    return out, kept


def _part_sizes(n_chunks: int) -> list[int]:
    """Chunks of each part: the first ones PART_SHARE of what is left, since the values of a part take about two thirds
    of the time of as many chunks' keys; few in the last, which no keys hide."""
    sizes, left = [], n_chunks
    while left >= 2 * LEAST_CHUNKS:
        sizes.append(max(LEAST_CHUNKS, int(PART_SHARE * left)))
        left -= sizes[-1]
    return [*sizes, left]


def _sizes(n_tokens: int, chunk_size: int) -> list[int]:
    """Tokens of each chunk."""
    return [min(chunk_size, n_tokens - start) for start in range(0, n_tokens, chunk_size)]


def _scale(q: Tensor, mask: Tensor | None, options: ChunkOptions) -> Tensor:
    """(n_chunks,M): -lr times the scale of the update; for ``released``, scale = H k ns / M pairs."""
    o = options
    n_memories, n_rows, n_tokens, n_heads, _ = q.shape
    sizes = _sizes(n_tokens, o.chunk_size)
    if o.update_scale == "paper":
        return q.new_full((len(sizes), n_memories), -o.lr)
    n_effective = None
    if mask is not None:
        real = torch.nn.functional.pad(
            (mask * _writes(q, o)).to(q.dtype).sum(1), (0, len(sizes) * o.chunk_size - n_tokens)
        )
        n_effective = real.view(n_memories, len(sizes), o.chunk_size).sum(-1).T
    # Filled on the device: only the last chunk may be shorter, and a copy from the host can't be captured.
    scale = q.new_empty(len(sizes), n_memories)
    for part, size in ((slice(0, -1), sizes[0]), (slice(-1, None), sizes[-1])):
        per_token = -o.lr * n_heads * o.top_k / max(n_rows * max(size - o.lookahead, 0), 1)
        scale[part] = per_token * (n_rows * size if n_effective is None else n_effective[part])
    return scale


def _writes(q: Tensor, options: ChunkOptions) -> Tensor:
    """(T,) bool: whether token t has a target t + L in its chunk."""
    n_tokens = q.shape[2]
    token = torch.arange(n_tokens, device=q.device)
    chunk_end = (token.div(options.chunk_size, rounding_mode="floor") + 1) * options.chunk_size
    return token + options.lookahead < chunk_end.clamp(max=n_tokens)


class _WriteChunks(torch.autograd.Function):
    """The forward, keeping what the closed-form backward needs."""

    @staticmethod
    def forward(ctx, q, v, gate, keys, values, mask, options, last, goes_on):
        out, kept = _forward(q, v, gate, keys, values, mask, options, last, keep=True, goes_on=goes_on)
        ctx.options, ctx.shapes = options, (keys.shape, values.shape)
        # Not the table itself: it would keep its own call alive.
        ctx.last = weakref.ref(last)
        ctx.save_for_backward(q, v, gate, mask, *(kept or ()))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out.slots, out.value_loss, out.address_loss)
        place = values.new_empty(()).expand(values.shape) if goes_on else None
        return out.read, out.keys, place, out.slots, out.weights, out.value_loss, out.address_loss

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_keys, d_values, _slots, d_weights, _value_loss, _address_loss):
        q, v, gate, mask, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if not kept:
            # No tokens: the tables went through unchanged.
            return q.new_zeros(q.shape), v.new_zeros(v.shape), gate, d_keys, d_values, None, None, None, None
        last = ctx.last()
        reuse = not (_graph_is_kept() or (last is not None and last.needs_versions))
        gradients = _backward(
            q, v, gate, mask, _Kept(*kept), d_out, d_keys, d_values, d_weights, ctx.shapes, ctx.options,
            needs_keys=needs[3], needs_values=needs[4], reuse_versions=reuse,
        )  # fmt: skip
        return *gradients, None, None, None, None


def _graph_is_kept() -> bool:
    """Whether the backward that runs may be followed by another through the same graph (``retain_graph``)."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or asked()


def _backward(
    q: Tensor,
    v: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    kept: _Kept,
    d_out: Tensor | None,
    d_keys: Tensor | None,
    d_values: Tensor | None,
    d_weights: Tensor | None,
    shapes: tuple[torch.Size, torch.Size],
    options: ChunkOptions,
    *,
    needs_keys: bool,
    needs_values: bool,
    reuse_versions: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Derivatives of q, v, the gate and the two tables (section by section the forward in reverse)."""
    o = options
    q, v = q.contiguous(), v.contiguous()
    gate, mask = (None if tensor is None else tensor.contiguous() for tensor in (gate, mask))
    keys_shape, values_shape = shapes
    d_out = q.new_zeros(kept.read.shape) if d_out is None else d_out.contiguous()
    d_weights = None if d_weights is None else d_weights.contiguous()

    # C'. Derivative of the rows after each chunk, from the last chunk to the first.
    given = d_values is not None
    if not given:
        d_table = q.new_zeros(values_shape) if needs_values else None
    elif needs_values:
        d_table = d_values.clone(memory_format=torch.contiguous_format)
    else:
        d_table = d_values.contiguous()
    d_v = torch.empty_like(v)
    d_gate = None if gate is None else torch.empty_like(gate)
    d_half = torch.empty_like(kept.measures)
    value_chain_backward(
        kept.versions if reuse_versions else torch.empty_like(kept.versions), d_table, kept.table, kept.versions,
        kept.slots, kept.weights, kept.pairs, kept.accesses, kept.read, v, gate, mask, d_out, d_weights, o.temperature,
        d_v, d_gate, d_half, o.chunk_size, o.lookahead, given=given, needs_table=needs_values,
    )  # fmt: skip

    # A'. Derivative of the keys after each chunk; the last chunk's step matters only to the keys that go on.
    d_q = torch.empty_like(q)
    given = d_keys is not None
    d_keys = q.new_zeros(keys_shape) if d_keys is None else d_keys.clone(memory_format=torch.contiguous_format)
    key_chain_backward(
        q, kept.keys, d_keys, kept.indices, kept.measures, kept.probabilities, d_half, kept.mean, kept.totals, d_q,
        o.chunk_size, o.score, o.lr, o.address_weight, needs_keys=needs_keys, given=given,
    )  # fmt: skip
    return d_q, d_v, d_gate, d_keys if needs_keys else None, d_table if needs_values else None
