"""Fast-weight product-key memory on a GPU: the chunks of a call as a few Triton kernels, backward included.

Same mathematics as :mod:`mixers.fwpkm.reference`, in an order of its own. Without ``value_loss_to_keys`` the keys never
depend on the values, so the call runs in three parts:

    A. key_chain: all chunks' addressing and addressing steps; combine: the slots and weights of all tokens
    B. one stable sort of all (chunk, slot) accesses
    C. value_chain: for every chunk, read and take the errors, step the rows that were read

The backward goes in the opposite order, from the rows that each chunk overwrote and the keys that it used: C' and A'.
A chain is one launch: its programs go from chunk to chunk together and meet where a step needs what another wrote
(:mod:`mixers.kernels.barrier`). So the number of launches does not depend on the number of chunks. Nothing waits for
the device on the host, or has a size that depends on data, so a call can be captured in a CUDA graph.

Cost at B sequences, J = H*k slots a token, float32, beside inputs and outputs: forward about 4 (4 J V + 4 V + 3 H K)
bytes per token, backward the same again; kept for the backward: J V + 2 H K elements per token and the keys of each
chunk. Every row that a chunk touches is read once, kept once (training) and written once; a read gathers J rows.

Differences from the reference: slots of equal score are taken lowest index first; sub-keys are ranked by tf32x3
products before the chosen are scored exactly, so two sub-keys whose distances differ by less than about 1e-6 |q| |key|
may swap; ``value_loss`` and ``address_loss`` carry no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixers.errors import UserError
from mixers.fwpkm.reference import ENTROPY_EPS, ChunkOptions, ChunksOutput
from mixers.kernels.address import combine
from mixers.kernels.groups import Groups, group_accesses
from mixers.kernels.key_chain import key_chain
from mixers.kernels.key_chain_backward import key_chain_backward
from mixers.kernels.value_chain import value_chain
from mixers.kernels.value_chain_backward import value_chain_backward

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


@torch.compiler.disable
def write_chunks(
    q: Tensor, v: Tensor, gate: Tensor | None, keys: Tensor, values: Tensor, mask: Tensor | None, options: ChunkOptions
) -> ChunksOutput:
    """Read and write q (M,R,T,H,K), v (M,R,T,V), gate and mask (M,R,T) chunk by chunk into keys and values.

    Arguments and result as :func:`mixers.fwpkm.reference.write_chunks`: new tables, the given ones stay as they are.

    Raises:
        UserError: an option, size, dtype or device has no kernel.
    """
    why = unsupported(q.device, q.dtype, keys.shape[3], values.shape[-1], options)
    if why:
        raise UserError(f"fast_weight_pkm: impl='triton' has no kernel for {why}; use impl='auto' or 'reference'")
    inputs = (q, v, gate, keys, values)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return ChunksOutput(*_WriteChunks.apply(*inputs, mask, options))
    return _forward(q, v, gate, keys, values, mask, options, keep=False)[0]


class _Kept(NamedTuple):
    """What the backward needs of a forward, besides its inputs. E = M*R*T*J accesses, n_chunks = ceil(T / C).

    keys (n_chunks,M,H,2,n,K/2): as each chunk used them. indices, measures, probabilities (M,R,T,H,2,k). pairs, slots,
    weights (M,R,T,J). read (M,R,T,V). mean (n_chunks,M,2,n). totals (n_chunks,M,H,2,n) of the keys' steps. pair_weight (M,R,T). scale (n_chunks,M): -lr * scale.
    order, row, first, count: :class:`Groups`. overwritten (E,V).
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
    pair_weight: Tensor
    scale: Tensor
    order: Tensor
    row: Tensor
    first: Tensor
    count: Tensor
    overwritten: Tensor


def _forward(
    q: Tensor,
    v: Tensor,
    gate: Tensor | None,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    options: ChunkOptions,
    *,
    keep: bool,
) -> tuple[ChunksOutput, _Kept | None]:
    o = options
    q, v = q.contiguous(), v.contiguous()
    n_memories, n_rows, n_tokens, n_heads, _ = q.shape
    n_subkeys, value_dim, top_k = keys.shape[3], values.shape[-1], o.top_k
    tokens, n_read = (n_memories, n_rows, n_tokens), n_heads * top_k
    n_chunks = -(-n_tokens // o.chunk_size)
    n_kept_keys = n_chunks + 1 if keep and o.address_weight != 0 else 1
    all_keys = keys.new_empty(n_kept_keys, *keys.shape)
    all_keys[0] = keys
    table = values.clone(memory_format=torch.contiguous_format)
    read = q.new_empty(*tokens, value_dim)
    indices = torch.empty(*tokens, n_heads, 2, top_k, dtype=torch.int32, device=q.device)
    measures, probabilities = q.new_empty(indices.shape), q.new_empty(indices.shape)
    pairs = torch.empty(*tokens, n_read, dtype=torch.int32, device=q.device)
    slots = torch.empty(*tokens, n_read, dtype=torch.int64, device=q.device)
    weights = q.new_empty(*tokens, n_read)
    if not read.shape[:3].numel():
        nothing = q.new_zeros(())
        return ChunksOutput(read, all_keys[0], table, slots, weights, nothing, nothing.clone()), None

    # Without a step nothing is used, and the loss is 0.
    mean = (q.new_empty if o.address_weight else q.new_zeros)(n_chunks, n_memories, 2, n_subkeys)
    totals = q.new_empty(n_kept_keys - 1, *keys.shape[:-1])
    key_chain(
        q, all_keys, indices, measures, probabilities, mean, totals, o.chunk_size, o.score, o.lr, o.address_weight
    )
    combine(indices, measures, pairs, slots, weights, n_subkeys, o.score, o.temperature)
    groups = group_accesses(slots, values.shape[1], o.chunk_size)
    pair_weight = _pair_weight(q, gate, mask, o)
    scale = _scale(q, mask, o)
    squared_error = q.new_empty(tokens)
    overwritten = q.new_empty(slots.numel(), value_dim) if keep else None
    value_chain(
        table, slots, weights, v, pair_weight, scale, groups, read, squared_error, overwritten, o.chunk_size,
        o.lookahead,
    )  # fmt: skip

    n_pairs = n_memories * n_rows * sum(max(size - o.lookahead, 0) for size in _sizes(n_tokens, o.chunk_size))
    out = ChunksOutput(
        read,
        # A copy where it is one of many: a state would keep the keys of all chunks alive.
        all_keys[-1].clone() if n_kept_keys > 1 else all_keys[-1],
        table,
        slots,
        weights,
        0.5 * squared_error.sum() / max(n_pairs, 1),
        o.address_weight * (mean * torch.log(mean + ENTROPY_EPS)).sum() / (n_memories * n_chunks),
    )
    if overwritten is None:
        return out, None
    kept = _Kept(
        all_keys, indices, measures, probabilities, pairs, slots, weights, read, mean, totals, pair_weight, scale,
        *groups, overwritten,
    )  # fmt: skip
    return out, kept


def _sizes(n_tokens: int, chunk_size: int) -> list[int]:
    """Tokens of each chunk."""
    return [min(chunk_size, n_tokens - start) for start in range(0, n_tokens, chunk_size)]


def _writes(q: Tensor, options: ChunkOptions) -> Tensor:
    """(T,) bool: whether token t has a target t + L in its chunk."""
    n_tokens = q.shape[2]
    token = torch.arange(n_tokens, device=q.device)
    chunk_end = (token.div(options.chunk_size, rounding_mode="floor") + 1) * options.chunk_size
    return token + options.lookahead < chunk_end.clamp(max=n_tokens)


def _pair_weight(q: Tensor, gate: Tensor | None, mask: Tensor | None, options: ChunkOptions) -> Tensor:
    """g_t m_t (M,R,T), contiguous; zero for tokens without a target."""
    weight = _writes(q, options).to(q.dtype).expand(q.shape[:3])
    if gate is not None:
        weight = weight * gate
    if mask is not None:
        weight = weight * mask
    return weight.contiguous()


def _scale(q: Tensor, mask: Tensor | None, options: ChunkOptions) -> Tensor:
    """(n_chunks,M): -lr times the scale of the update; for ``released``, scale = H k ns / M pairs."""
    o = options
    n_memories, n_rows, n_tokens, n_heads, _ = q.shape
    sizes = _sizes(n_tokens, o.chunk_size)
    if o.update_scale == "paper":
        return q.new_full((len(sizes), n_memories), -o.lr)
    # Filled on the device: only the last chunk may be shorter, and a copy from the host can't be captured.
    n_pairs, n_effective = q.new_empty(len(sizes), 1), q.new_empty(len(sizes), n_memories)
    for part, size in ((slice(0, -1), sizes[0]), (slice(-1, None), sizes[-1])):
        n_pairs[part] = max(n_rows * max(size - o.lookahead, 0), 1)
        n_effective[part] = n_rows * size
    if mask is not None:
        real = (mask * _writes(q, o)).to(q.dtype).sum(1)
        real = torch.nn.functional.pad(real, (0, len(sizes) * o.chunk_size - n_tokens))
        n_effective = real.view(n_memories, len(sizes), o.chunk_size).sum(-1).T
    ratio = n_effective / n_pairs
    return (-o.lr * n_heads * o.top_k * ratio).contiguous()


class _WriteChunks(torch.autograd.Function):
    """The forward, keeping what the closed-form backward needs. Nothing kept is written to by the backward."""

    @staticmethod
    def forward(ctx, q, v, gate, keys, values, mask, options):
        out, kept = _forward(q, v, gate, keys, values, mask, options, keep=True)
        ctx.options, ctx.shapes = options, (keys.shape, values.shape)
        ctx.save_for_backward(q, v, gate, mask, *(kept or ()))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out.slots, out.value_loss, out.address_loss)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_keys, d_values, _slots, d_weights, _value_loss, _address_loss):
        q, v, gate, mask, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if not kept:
            # No tokens: the tables went through unchanged.
            return q.new_zeros(q.shape), v.new_zeros(v.shape), gate, d_keys, d_values, None, None
        gradients = _backward(
            q, v, _Kept(*kept), d_out, d_keys, d_values, d_weights, ctx.shapes, ctx.options,
            needs_keys=needs[3], needs_values=needs[4],
        )  # fmt: skip
        d_q, d_v, d_pair_weight, d_keys, d_values = gradients
        d_gate = None
        if gate is not None and needs[2]:
            d_gate = d_pair_weight if mask is None else d_pair_weight * mask
        return d_q, d_v, d_gate, d_keys, d_values, None, None


def _backward(
    q: Tensor,
    v: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Derivatives of q, v, the pair weights and the two tables (section by section the forward in reverse)."""
    o = options
    q, v = q.contiguous(), v.contiguous()
    keys_shape, values_shape = shapes
    d_out = q.new_zeros(kept.read.shape) if d_out is None else d_out.contiguous()
    d_weights = None if d_weights is None else d_weights.contiguous()

    # C'. Derivative of the table after each chunk, in place in one table, from the last chunk to the first.
    touched = None
    if d_values is not None:
        later = d_values.clone(memory_format=torch.contiguous_format)
    elif needs_values:
        later = q.new_zeros(values_shape)
    else:
        later = q.new_empty(values_shape)
        touched = torch.zeros(values_shape[:-1], dtype=torch.int8, device=q.device)
    group_of, factors = _by_access(kept, values_shape[1], o)
    d_v = torch.zeros_like(v)
    d_pair_weight = torch.empty_like(kept.pair_weight)
    d_half = torch.empty_like(kept.measures)
    value_chain_backward(
        later, touched, kept.overwritten, kept.slots, group_of, factors, kept.weights, kept.pairs,
        Groups(kept.order, kept.row, kept.first, kept.count), kept.read, v, kept.pair_weight, d_out, d_weights,
        o.temperature, d_v, d_pair_weight, d_half, o.chunk_size, o.lookahead, needs_values=needs_values,
    )  # fmt: skip

    # A'. Derivative of the keys after each chunk; the last chunk's step matters only to the keys that go on.
    d_q = torch.empty_like(q)
    d_keys = q.new_zeros(keys_shape) if d_keys is None else d_keys.clone(memory_format=torch.contiguous_format)
    key_chain_backward(
        q, kept.keys, d_keys, kept.indices, kept.measures, kept.probabilities, d_half, kept.mean, kept.totals, d_q,
        o.chunk_size, o.score, o.lr, o.address_weight, needs_keys=needs_keys,
    )  # fmt: skip
    return d_q, d_v, d_pair_weight, d_keys if needs_keys else None, later if needs_values else None


def _by_access(kept: _Kept, n_slots: int, options: ChunkOptions) -> tuple[Tensor, Tensor]:
    """Per access, in the order of the tokens: the position of its group, and its row's -lr * scale / cnt (E,)."""
    n_accesses = kept.order.numel()
    n_tokens = kept.slots.shape[2]
    group_of = torch.empty_like(kept.order).scatter_(0, kept.order, kept.first)
    per_chunk = n_accesses // n_tokens * options.chunk_size
    chunk = torch.arange(n_accesses, device=kept.order.device).div(per_chunk, rounding_mode="floor")
    memory = kept.row.div(n_slots, rounding_mode="floor")
    factor = kept.scale.flatten()[chunk * kept.scale.shape[1] + memory] / kept.count
    return group_of, torch.empty_like(factor).scatter_(0, kept.order, factor)
