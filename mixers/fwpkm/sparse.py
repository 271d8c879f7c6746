"""Fast-weight product-key memory that touches only the rows that are read, with the backward written out.

The mathematics is that of :mod:`mixers.fwpkm.reference`; what differs is the cost. A call copies the rows that it
touches out of the table, works on the copies chunk by chunk, and hands back codes and rows (see
:mod:`mixers.fwpkm.touched_rows`). Nothing is undone from a live table: the backward has, of every
chunk, the rows that were touched before it as they were then (4 V bytes a row; the others it finds in the table again),
the keys, and what the queries selected. It goes from the last chunk to the
first and forms derivatives only of rows that another chunk reads or the caller asks for: a row that one chunk alone
touches, of a table that isn't learned, has none.

Letters: B sequences, T tokens, M memories (B or 1), R = B/M, C chunk, S = R*C, H heads, k slots per head, J = H*k,
n sub-keys per half, N = n*n slots, K key width, V value width, U rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixers.errors import UserError
from mixers.fwpkm.reference import ChunkOptions
from mixers.fwpkm.sparse_keys import (
    Addresses,
    KeyAccesses,
    address,
    address_backward,
    group_keys,
    half_differences,
    halves_to_pairs,
    key_step,
    key_step_backward,
    pairs_to_halves,
)
from mixers.fwpkm.sparse_rows import Accesses, first_rows, gather_dot, gather_sum, group_accesses, segment_sum
from mixers.fwpkm.sparse_values import (
    row_changes,
    row_changes_backward,
    value_loss_on_pairs,
    value_loss_on_pairs_backward,
)
from mixers.fwpkm.touched_rows import TouchedRows, UntouchedRows, base_rows, restore


class SparseOutput(NamedTuple):
    """read (B,T,V); keys (M,H,2,n,K/2) after the call; codes (U,) int64 and rows (U,V): all rows touched by writing
    chunks, those given first, the others in the order in which they were met; slots and weights (B,T,J); the losses ()
    without gradient."""

    read: Tensor
    keys: Tensor
    codes: Tensor
    rows: Tensor
    slots: Tensor
    weights: Tensor
    value_loss: Tensor
    address_loss: Tensor


def why_not_sparse(options: ChunkOptions) -> str | None:
    """Why these options have no sparse form, None if they have one."""
    if options.weight_decay:
        return f"weight_decay={options.weight_decay} moves every row of the table at every write"
    return None


def write_chunks_sparsely(
    q: Tensor,
    v: Tensor,
    gate: Tensor | None,
    keys: Tensor,
    base: Tensor,
    codes: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    n_written: int,
    options: ChunkOptions,
) -> SparseOutput:
    """Read T tokens chunk by chunk, and write the chunks of the first ``n_written``; the others only read.

    q (B,T,H,K), v (B,T,V), gate and mask (B,T) or None; keys (M,H,2,n,K/2); base (1 or M,N,V), codes (U,) ascending
    and rows (U,V): the memories, see :mod:`mixers.fwpkm.touched_rows`. n_written is a multiple of the chunk size, or T.
    At most one chunk's tokens may follow it.

    Gradients flow into q, v, gate, keys, base and rows. There is no second derivative.
    """
    reason = why_not_sparse(options)
    if reason:
        raise UserError(f"fast_weight_pkm: impl='sparse' can't run this: {reason}; use impl='reference' or 'auto'")
    tensors = (q, v, gate, keys, base, rows)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out = _SparseChunks.apply(q, v, gate, keys, base, rows, codes, mask, n_written, options, keep)
    return SparseOutput(*out)


class _Chunk(NamedTuple):
    """What the backward needs of one chunk: its keys; of the rows before it those touched earlier (U',V); its accesses
    to places in the call's table and to sub-keys; and its addresses."""

    keys: Tensor
    old: Tensor
    accesses: Accesses
    use: KeyAccesses
    at: Addresses


# Tensors of a _Chunk, one after another: what goes through save_for_backward.
N_SAVED = 2 + len(Accesses._fields) + len(KeyAccesses._fields) + len(Addresses._fields)


class _SparseChunks(torch.autograd.Function):
    """The chunk loop. Its arguments and results are those of :func:`write_chunks_sparsely`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        v: Tensor,
        gate: Tensor | None,
        keys: Tensor,
        base: Tensor,
        rows: Tensor,
        codes: Tensor,
        mask: Tensor | None,
        n_written: int,
        options: ChunkOptions,
        keep: bool,
    ) -> tuple[Tensor, ...]:
        call = _Call(q, v, gate, mask, keys.shape[0], n_written, options)
        n_slots = base.shape[1]
        if n_written:
            table = TouchedRows(base, call.n_memories, codes, rows, q.shape[0] * q.shape[1] * call.n_read)
        else:
            table = UntouchedRows(base, codes, rows)
        memory_offsets = torch.arange(call.n_memories, device=q.device).view(-1, 1, 1) * n_slots

        read = torch.empty(*q.shape[:2], v.shape[-1], dtype=v.dtype, device=v.device)
        slots, weights, chunks = [], [], []
        squared_error, neg_entropy = q.new_zeros(()), q.new_zeros(())
        written, new_keys = (codes, rows), keys
        for part, is_written in call.parts:
            queries = call.queries(part)
            at, differences = address(queries, keys, options, call.room)
            accesses = group_accesses(table.find((at.slots + memory_offsets).flatten(0, 1)))
            a = at.weights.flatten(0, 1)
            before = table.take(accesses.rows, call.room_for_rows)
            on_tokens = gather_sum(before, accesses.index, a)
            call.per_memory(read)[:, :, part] = call.rows_of(on_tokens, part)
            slots.append(call.rows_of(at.slots.flatten(0, 1), part))
            weights.append(call.rows_of(a, part))
            use = group_keys(at, keys) if keep or is_written else None
            if keep:
                n_old = accesses.rows.numel() - table.codes[-1].numel()
                chunks.append(_Chunk(keys, before[:n_old].clone(), accesses, use, at))
            if not is_written:
                continue
            difference, weight = call.difference(on_tokens, part)
            error = call.error(difference, weight, part)
            squared_error = squared_error + (weight * torch.linalg.vecdot(difference, difference)).sum()
            on_half = None
            if options.value_loss_to_keys:
                on_pairs = value_loss_on_pairs(before, error * call.loss_scale(part), a, accesses, options.temperature)
                on_half = pairs_to_halves(on_pairs.view(at.weights.shape), at.pairs)
            scale = call.row_scale(accesses, part)
            table.put(accesses.rows, before, row_changes(error, a, scale, accesses, options.lr, options.clip))
            new_keys, chunk_entropy = key_step(queries, keys, at, use, differences, on_half, options)
            neg_entropy = neg_entropy + chunk_entropy
            if call.keys_move:
                keys = new_keys
            written = table.met()

        slots_out, weights_out = call.join(slots, torch.int64), call.join(weights, q.dtype)
        n_pairs = call.n_pairs()
        value_loss = 0.5 * squared_error / max(n_pairs * v.shape[-1], 1)
        address_loss = neg_entropy / max(call.n_written_chunks, 1)
        codes_out, rows_out = written
        # An output that is an input would be taken for a view of it.
        keys_out = keys.view_as(keys) if call.keys_move and call.n_written_chunks else keys.clone()
        if not n_written:
            rows_out, codes_out = rows_out.view_as(rows_out), codes_out.view_as(codes_out)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(codes_out, slots_out, value_loss, address_loss)
        if keep:
            ctx.call_options = (keys_out.shape, n_written, options)
            ctx.sizes = (rows.shape, [new.numel() for new in table.codes[1:]])
            ctx.save_for_backward(
                q, v, gate, mask, read, base, torch.cat(table.codes),
                *(t for c in chunks for t in (c.keys, c.old, *c.accesses, *c.use, *c.at)),
            )  # fmt: skip
        return read, keys_out, codes_out, rows_out, slots_out, weights_out, value_loss, address_loss

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        d_read: Tensor | None,
        d_keys: Tensor | None,
        _codes: None,
        d_rows: Tensor | None,
        _slots: None,
        d_weights: Tensor | None,
        *_losses: None,
    ) -> tuple[Tensor | None, ...]:
        q, v, gate, mask, read, base, all_codes, *saved = ctx.saved_tensors
        key_shape, n_written, options = ctx.call_options
        rows_shape, n_new_rows = ctx.sizes
        chunks = [_unpack(saved[i : i + N_SAVED]) for i in range(0, len(saved), N_SAVED)]
        call = _Call(q, v, gate, mask, key_shape[0], n_written, options)

        need = ctx.needs_input_grad
        all_rows = need[4] or need[5]
        d_table = _RowDerivatives(v, all_codes.numel())
        if d_rows is not None:
            d_table.start(d_rows)
        elif need[5]:
            d_table.start(v.new_zeros(rows_shape))
        d_q, d_v = torch.empty_like(q), torch.zeros_like(v)
        d_gate = None if gate is None else torch.zeros_like(gate)
        new_codes = all_codes[rows_shape[0] :].split(n_new_rows)
        backwards = (reversed(x) for x in (call.parts, chunks, new_codes))
        for (part, is_written), chunk, new in zip(*backwards, strict=True):
            before = restore(chunk.old, new, base.flatten(0, 1), call.room_for_rows)
            queries, at, accesses = call.queries(part), chunk.at, chunk.accesses
            a = at.weights.flatten(0, 1)
            d_a = torch.zeros_like(a) if d_weights is None else call.tokens(d_weights, part).clone()
            d_on_tokens = v.new_zeros(a.shape[0], v.shape[-1]) if d_read is None else call.tokens(d_read, part)
            differences = half_differences(queries, chunk.keys, at.half_indices, options.score, call.room)
            later, d_after = d_table.take(accesses.rows)
            step, on_before = None, None
            if is_written:
                on_tokens = call.tokens(read, part)
                difference, weight = call.difference(on_tokens, part)
                error = call.error(difference, weight, part)
                scale = call.row_scale(accesses, part)
                d_error, d_a_write = row_changes_backward(
                    d_after, later, error, a, scale, accesses, options.lr, options.clip
                )
                d_a += d_a_write
                if d_keys is not None and call.keys_move:
                    on_half = None
                    if options.value_loss_to_keys:
                        error_mean = error * call.loss_scale(part)
                        on_pairs = value_loss_on_pairs(before, error_mean, a, accesses, options.temperature)
                        on_half = pairs_to_halves(on_pairs.view(at.weights.shape), at.pairs)
                    step = key_step_backward(queries, chunk.keys, at, chunk.use, differences, on_half, d_keys, options)
                    if options.value_loss_to_keys:
                        d_pairs = halves_to_pairs(step.on_half, at.pairs).flatten(0, 1)
                        on_before, d_error_mean, d_a_loss = value_loss_on_pairs_backward(
                            d_pairs, before, error_mean, a, accesses, options.temperature
                        )
                        d_error = d_error + d_error_mean * call.loss_scale(part)
                        d_a += d_a_loss
                d_on_tokens = call.error_backward(d_error, difference, weight, part, d_on_tokens, d_v, d_gate)
            d_a += gather_dot(before, accesses.index, d_on_tokens)
            # The rows that nobody touched before are the last ones.
            first = first_rows(accesses, accesses.rows.numel() - (0 if all_rows else new.numel()))
            d_before = segment_sum(d_on_tokens, a, first.order, first.starts)
            if on_before is not None:
                d_before += on_before[: first.rows.numel()]
            d_table.put(first.rows, later, d_after, d_before)
            d_queries, d_chunk_keys = address_backward(
                queries, chunk.keys, at, chunk.use, differences, step, d_a.view(at.weights.shape), options
            )
            call.per_memory(d_q)[:, :, part] = call.rows_of(d_queries.flatten(0, 1), part)
            # The step hands on what came through the new keys; without it, they were the old ones.
            if d_keys is not None and step is None:
                d_chunk_keys = d_chunk_keys + d_keys
            d_keys = d_chunk_keys

        d_base = None
        if need[4]:
            d_base = torch.zeros_like(base)
            new = all_codes[rows_shape[0] :]
            into = group_accesses(base_rows(new, d_base.flatten(0, 1)).unsqueeze(1))
            ones = v.new_ones(new.numel(), 1)
            summed = segment_sum(d_table.table[rows_shape[0] :], ones, into.order, into.starts)
            d_base.flatten(0, 1)[into.rows] = summed
        return (
            d_q, d_v, d_gate, d_keys if need[3] else None, d_base, d_table.table[: rows_shape[0]] if need[5] else None,
            None, None, None, None, None,
        )  # fmt: skip


def _unpack(saved: list[Tensor]) -> _Chunk:
    n = 2 + len(Accesses._fields)
    n_keys = n + len(KeyAccesses._fields)
    return _Chunk(*saved[:2], Accesses(*saved[2:n]), KeyAccesses(*saved[n:n_keys]), Addresses(*saved[n_keys:]))


class _RowDerivatives:
    """Derivatives of the rows of the call's table, from its last chunk to its first: table (P,V).

    A row has one only if it was given (``start``) or a chunk put one there, so nothing is filled with zeros.
    """

    def __init__(self, like: Tensor, n_rows: int) -> None:
        self.table = like.new_empty(n_rows, like.shape[-1])
        self.known = torch.zeros(n_rows, dtype=torch.bool, device=like.device)

    def start(self, d_rows: Tensor) -> None:
        """The first rows' derivatives (U,V) after the last chunk."""
        self.table[: d_rows.shape[0]] = d_rows
        self.known[: d_rows.shape[0]] = True

    def take(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the distinct ``places`` (U,) have a derivative (L,), ascending, and these (L,V), copied."""
        later = self.known[places].nonzero().squeeze(1)
        return later, self.table.index_select(0, places[later])

    def put(self, places: Tensor, later: Tensor, d_after: Tensor, d_before: Tensor) -> None:
        """Set the derivatives at ``places`` (U',), the first of those in :meth:`take`, to ``d_before`` (U',V), which is
        overwritten, plus what was there: rows after a chunk are the rows before it and a change."""
        n_here = int((later < places.numel()).sum())
        if n_here == places.numel():
            d_before += d_after[:n_here]
        else:
            d_before.index_add_(0, later[:n_here], d_after[:n_here])
        self.table.index_copy_(0, places, d_before)
        self.known[places] = True


class _Call:
    """Shapes of one call: where its chunks lie, and its pairs (t, t+L) as errors of all the chunk's tokens.

    ``part`` is a slice of tokens. (M*S,...) has the tokens of a part by memory, sequence and time.
    """

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        gate: Tensor | None,
        mask: Tensor | None,
        n_memories: int,
        n_written: int,
        options: ChunkOptions,
    ) -> None:
        self.q, self.v, self.gate, self.mask = q, v, gate, mask
        self.n_memories, self.options = n_memories, options
        self.n_rows = q.shape[0] // n_memories
        self.n_read = q.shape[2] * options.top_k
        n_tokens, step = q.shape[1], options.chunk_size
        self.parts = [(slice(i, min(i + step, n_written)), True) for i in range(0, n_written, step)]
        self.n_written_chunks = len(self.parts)
        if n_written < n_tokens:
            assert n_tokens - n_written <= step, (n_tokens, n_written, step)
            self.parts.append((slice(n_written, n_tokens), False))
        # Without a reason to move, the keys stay the very same tensor.
        self.keys_move = bool(options.address_weight) or options.value_loss_to_keys
        # Where each chunk's differences and rows are formed: the same memory for all, which need not be mapped again.
        n_most = max((part.stop - part.start for part, _ in self.parts), default=0)
        n_accesses = q.shape[0] * n_most * self.n_read
        self.room = q.new_empty(n_accesses * q.shape[-1])
        self.room_for_rows = v.new_empty(n_accesses, v.shape[-1])

    def per_memory(self, x: Tensor) -> Tensor:
        """(B,T,...) -> (M,R,T,...), a view."""
        return x.view(self.n_memories, self.n_rows, *x.shape[1:])

    def tokens(self, x: Tensor, part: slice) -> Tensor:
        """(B,T,...) -> (M*S,...)."""
        return x[:, part].flatten(0, 1)

    def rows_of(self, x: Tensor, part: slice) -> Tensor:
        """(M*S,...) -> (M,R,C,...)."""
        return x.view(self.n_memories, self.n_rows, part.stop - part.start, *x.shape[1:])

    def queries(self, part: slice) -> Tensor:
        """(M,S,H,K)."""
        return self.q[:, part].reshape(self.n_memories, -1, *self.q.shape[2:])

    def join(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """(M,R,C,J) of all chunks -> (B,T,J)."""
        if not parts:
            return torch.zeros(*self.q.shape[:2], self.n_read, dtype=dtype, device=self.q.device)
        return torch.cat(parts, dim=2).flatten(0, 1)

    def n_pairs(self) -> int:
        """Pairs of all written chunks and sequences."""
        lengths = [part.stop - part.start for part, is_written in self.parts if is_written]
        return self.q.shape[0] * sum(max(length - self.options.lookahead, 0) for length in lengths)

    def _n_writing(self, part: slice) -> int:
        return max(part.stop - part.start - self.options.lookahead, 0)

    def loss_scale(self, part: slice) -> float:
        """1 / (pairs of a memory * V): from summed to mean errors."""
        return 1.0 / max(self.n_rows * self._n_writing(part) * self.v.shape[-1], 1)

    def difference(self, on_tokens: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """read_t - v_{t+L} of the tokens that write (B,C-L,V), and their weight g m (B,C-L)."""
        n_writing, lookahead = self._n_writing(part), self.options.lookahead
        read = on_tokens.view(self.q.shape[0], -1, on_tokens.shape[-1])[:, :n_writing]
        difference = read - self.v[:, part.stop - n_writing : part.stop]
        assert n_writing == 0 or part.start + lookahead == part.stop - n_writing
        weight = read.new_ones(read.shape[:2])
        writing = slice(part.start, part.start + n_writing)
        if self.gate is not None:
            weight = weight * self.gate[:, writing]
        if self.mask is not None:
            weight = weight * self.mask[:, writing]
        return difference, weight

    def error(self, difference: Tensor, weight: Tensor, part: slice) -> Tensor:
        """e (M*S,V), zero at tokens that write nothing."""
        n_writing = difference.shape[1]
        error = self.v.new_empty(self.q.shape[0], part.stop - part.start, self.v.shape[-1])
        torch.mul(difference, weight.unsqueeze(-1), out=error[:, :n_writing])
        error[:, n_writing:] = 0
        return error.flatten(0, 1)

    def error_backward(
        self,
        d_error: Tensor,
        difference: Tensor,
        weight: Tensor,
        part: slice,
        d_on_tokens: Tensor,
        d_v: Tensor,
        d_gate: Tensor | None,
    ) -> Tensor:
        """Hand on the derivative of e (M*S,V): add it to d_v (B,T,V) and d_gate (B,T), and to d_on_tokens (M*S,V) in a
        copy, which is returned."""
        n_writing = difference.shape[1]
        by_sequence = (self.q.shape[0], -1, d_error.shape[-1])
        d_error = d_error.view(by_sequence)[:, :n_writing]
        if d_gate is not None:
            on_gate = torch.linalg.vecdot(d_error, difference)
            writing = slice(part.start, part.start + n_writing)
            if self.mask is not None:
                on_gate = on_gate * self.mask[:, writing]
            d_gate[:, writing] = on_gate
        d_difference = d_error * weight.unsqueeze(-1)
        d_v[:, part.stop - n_writing : part.stop] -= d_difference
        d_on_tokens = d_on_tokens.clone().view(by_sequence)
        d_on_tokens[:, :n_writing] += d_difference
        return d_on_tokens.flatten(0, 1)

    def row_scale(self, accesses: Accesses, part: slice) -> Tensor:
        """scale / cnt_u of the touched rows (U,)."""
        scale = 1 / accesses.counts.to(self.v.dtype)
        n_writing = self._n_writing(part)
        if self.options.update_scale == "paper" or not n_writing:
            return scale
        n_pairs = self.n_rows * n_writing
        if self.mask is None:
            return scale * (self.n_read * self.n_rows * (part.stop - part.start) / n_pairs)
        writing = self.mask[:, part.start : part.start + n_writing].to(scale.dtype)
        n_effective = writing.reshape(self.n_memories, -1).sum(1)
        memory = accesses.order[accesses.starts[:-1]] // (self.n_rows * (part.stop - part.start) * self.n_read)
        return scale * (self.n_read / n_pairs * n_effective)[memory]
