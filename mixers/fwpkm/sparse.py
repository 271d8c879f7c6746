"""Fast-weight product-key memory that touches only the rows that are read, with the backward written out.

The mathematics is that of :mod:`mixers.fwpkm.reference`; what differs is the cost. A call copies the rows that it
touches out of the table, works on the copies chunk by chunk, and hands back codes and rows (see
:mod:`mixers.fwpkm.touched_rows`). The sub-keys of a chunk never depend on the values, unless the value loss moves them,
so a call goes in three stages: the chain of the sub-keys; then for all chunks at once the choice of slots and the plan
of the rows; then the chain of the rows. Where the value loss moves the keys, every chunk is such a call of its own.

Nothing is undone from a live table: the backward has, of every chunk, the rows that were touched before it as they
were then (4 V bytes a row; the others it finds in the table again), the keys, and what the queries selected. It goes
from the last chunk to the first and forms derivatives only of rows that another chunk reads or the caller asks for: a
row that one chunk alone touches, of a table that isn't learned, has none.

Letters: B sequences, T tokens, M memories (B or 1), R = B/M, C chunk, S = R*C, H heads, k slots per head, J = H*k,
n sub-keys per half, N = n*n slots, K key width, V value width, U rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixers.errors import UserError
from mixers.fwpkm.kept_memory import room_for
from mixers.fwpkm.reference import ChunkOptions
from mixers.fwpkm.sparse_keys import (
    Addresses,
    Choice,
    Use,
    address,
    address_backward,
    choose,
    choose_backward,
    halves_to_pairs,
    key_step,
    key_step_backward,
    needed_differences,
    neg_entropy,
    pairs_to_halves,
    use_of,
)
from mixers.fwpkm.sparse_rows import bag_sums, dots, group_accesses, segment_sum
from mixers.fwpkm.sparse_values import (
    Shares,
    later_accesses,
    row_changes,
    row_changes_backward,
    unclipped,
    value_loss_on_pairs,
    value_loss_on_pairs_backward,
)
from mixers.fwpkm.touched_rows import Plan, Span, TouchedRows, UntouchedRows, base_rows, blocks, restore

FEW_DERIVATIVES = 2**18


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


class _Stage(NamedTuple):
    """What the backward needs of chunks that were planned together.

    choices: of those of equal length. weights and factors (E,): a, and -lr * scale / cnt of its row, of each access;
    shares: the same in the plan's order. Of each chunk: its addresses, its use of the sub-keys (None: they stay), and
    the rows that others before it touched, as it found them (U,V)."""

    plan: Plan
    choices: list[Choice]
    weights: Tensor
    factors: Tensor
    shares: Shares
    addresses: list[Addresses]
    uses: list[Use | None]
    old: list[Tensor]


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
        call = _Call(q, v, gate, mask, keys.shape, n_written, options)
        if n_written:
            n_writing, n_accesses = (q.shape[0] * n * call.n_read for n in (n_written, q.shape[1]))
            table = TouchedRows(base, call.n_memories, codes, rows, n_writing, n_accesses)
        else:
            table = UntouchedRows(base, codes, rows)
        now = keys.reshape(-1, *keys.shape[-2:])

        n_met, row_bytes = codes.numel(), v.shape[-1] * v.element_size()
        read = room_for(v.shape, v)
        slots, weights, stages, all_spans = [], [], [], []
        squared_errors, entropy = [q.new_zeros(())], q.new_zeros(())
        for parts in call.stages:
            addresses, uses, old_rows = [], [], []
            for part, is_written in parts:
                moves = is_written and call.keys_move
                halves = call.halves(part)
                at, found = address(halves, now, options, call.room, keep or moves)
                use = None
                if moves and not options.value_loss_to_keys:
                    use = use_of(at, call.n_memories, None, options)
                    now = key_step(halves, at, use, found, options)
                addresses.append(at)
                uses.append(use)

            choices = [choose([addresses[i] for i in same], call.n_memories, options) for same in call.equal(parts)]
            plan, spans = table.plan(call.codes(choices, base.shape[1]), call.n_accesses(parts), call.n_read)
            factors = call.row_factors(plan, spans, parts, base.shape[1])
            a = [chunk for choice in choices for chunk in choice.weights.unbind()]
            all_a = torch.cat([choice.weights.flatten() for choice in choices])
            in_order = all_a.index_select(0, plan.order)
            shares = Shares(in_order, in_order * factors.index_select(0, plan.order))
            n_writing = sum(is_written for _, is_written in parts)
            all_blocks = blocks(plan, spans[:n_writing], shares.moves, row_bytes)
            for i, (part, is_written) in enumerate(parts):
                span = spans[i]
                old_rows.append(table.kept(plan, span) if keep else None)
                on_tokens = (table.read if is_written else table.read_only)(plan, span, a[i])
                read[:, part] = on_tokens.view(q.shape[0], -1, v.shape[-1])
                if not is_written:
                    continue
                n_met = span.new_stop
                error, squared_error = call.error_in_place(on_tokens, part)
                squared_errors.append(squared_error)
                if options.value_loss_to_keys:
                    index = plan.places[span.entry : span.entry_stop].view(a[i].shape)
                    error_mean = error * call.loss_scale(part)
                    on_pairs = value_loss_on_pairs(table.table, index, error_mean, a[i], options.temperature)
                    on_half = pairs_to_halves(on_pairs.unsqueeze(0), choices[0].pairs)[0]
                    uses[i] = use_of(addresses[i], call.n_memories, on_half, options)
                    now = key_step(halves, addresses[i], uses[i], found, options)
                for block in all_blocks[i]:
                    table.add(block, row_changes(error, block, options.lr, options.clip))
            means = [use.mean for use in uses if use is not None]
            if options.address_weight and means:
                entropy = entropy + neg_entropy(torch.stack(means))
            slots += [choice.slots for choice in choices]
            weights += [choice.weights for choice in choices]
            all_spans.append(spans)
            if keep:
                stages.append(_Stage(plan, choices, all_a, factors, shares, addresses, uses, old_rows))

        slots_out, weights_out = call.join(slots, torch.int64), call.join(weights, q.dtype)
        value_loss = 0.5 * torch.stack(squared_errors).sum() / max(call.n_pairs() * v.shape[-1], 1)
        n_losses = max(call.n_written_chunks * call.n_memories, 1)
        address_loss = entropy * (options.address_weight / n_losses)
        # An output that is an input would be taken for a view of it.
        moved = call.keys_move and call.n_written_chunks
        keys_out = now.view(keys.shape) if moved else keys.clone()
        if n_written:
            codes_out, rows_out = table.codes[:n_met], table.table[:n_met]
        else:
            codes_out, rows_out = codes.view_as(codes), rows.view_as(rows)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(codes_out, slots_out, value_loss, address_loss)
        if keep:
            ctx.call_arguments = (keys.shape, n_written, options)
            ctx.spans, ctx.n_given = all_spans, codes.numel()
            all_codes = table.codes if n_written else torch.cat([codes, table.codes])
            tensors, ctx.spec = torch.utils._pytree.tree_flatten(stages)
            ctx.save_for_backward(q, v, gate, mask, read, base, all_codes, *tensors)
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
        q, v, gate, mask, read, base, all_codes, *tensors = ctx.saved_tensors
        stages: list[_Stage] = torch.utils._pytree.tree_unflatten(tensors, ctx.spec)
        key_shape, n_written, options = ctx.call_arguments
        call = _Call(q, v, gate, mask, key_shape, n_written, options)
        flat_base, all_base_rows = base.flatten(0, 1), base_rows(all_codes, base.flatten(0, 1))

        need = ctx.needs_input_grad
        all_before = need[4] or need[5]
        n_places = all_codes.numel()
        # Which rows have none is worth finding out only if there are many.
        all_after = d_rows is not None or len(stages) > 1 or n_places * v.shape[-1] <= FEW_DERIVATIVES
        # Where a row's derivative stands: by its place, or only those of rows that a chunk meets again.
        place = torch.arange(n_places, device=q.device)
        n_derivatives = n_places
        if not all_before and not all_after and stages:
            again = [stages[0].plan.rows[span.row : span.row_new] for span in ctx.spans[0]]
            again = torch.cat(again).unique()
            n_derivatives = again.numel()
            place = torch.zeros_like(place).index_copy_(0, again, place[:n_derivatives])
        d_table = v.new_zeros(n_derivatives, v.shape[-1])
        if d_rows is not None:
            d_table[: d_rows.shape[0]] = d_rows

        d_q, d_v = room_for(q.shape, q), room_for(v.shape, v)
        d_gate = None if gate is None else torch.zeros_like(gate)
        d_now = None if d_keys is None else d_keys.reshape(-1, *key_shape[-2:])
        for parts, stage, spans in zip(reversed(call.stages), reversed(stages), reversed(ctx.spans), strict=True):
            plan, choices, factors, shares = stage.plan, stage.choices, stage.factors, stage.shares
            a = [chunk for choice in choices for chunk in choice.weights.unbind()]
            places = place.index_select(0, plan.rows)
            n_writing = sum(is_written for _, is_written in parts)
            later = later_accesses(plan, spans, n_writing, call.n_read, places, n_places, all_after)
            later_factors = factors.index_select(0, later.entry)
            later_shares = later_factors * stage.weights.index_select(0, later.entry)
            base_row = all_base_rows.index_select(0, plan.places)
            d_shares, d_reads, d_extra = [], [], []
            for i in reversed(range(len(parts))):
                (part, is_written), span, old = parts[i], spans[i], stage.old[i]
                d_on_tokens = v.new_zeros(a[i].shape[0], v.shape[-1]) if d_read is None else call.tokens(d_read, part)
                step = on_before = None
                if is_written:
                    on_tokens = call.tokens(read, part)
                    difference, weight = call.difference(on_tokens, part)
                    error = call.error(difference, weight, part)
                    d_error = None
                    if later.bounds[i + 1] > later.bounds[i]:
                        inside = later_rows = None
                        if options.clip:
                            inside = unclipped(error, shares, plan, span, options.lr)
                            later_rows = plan.index[later.entry] - span.row
                        d_error, d_share = row_changes_backward(
                            d_table, later, i, error, later_shares, span, call.n_read, inside, later_rows
                        )
                        d_shares.append(d_share)
                    if d_now is not None and options.value_loss_to_keys:
                        halves, at = call.halves(part), stage.addresses[i]
                        found = needed_differences(halves, at, call.room)
                        step = key_step_backward(halves, at, stage.uses[i], found, d_now, call.n_memories, options)
                        before = restore(old, all_codes[span.new : span.new_stop], flat_base)
                        error_mean = error * call.loss_scale(part)
                        on_before, d_error_mean, d_a_loss = value_loss_on_pairs_backward(
                            halves_to_pairs(step.on_half.unsqueeze(0), choices[0].pairs)[0],
                            before, error_mean, a[i], plan.index.view(a[i].shape), plan, span, options.temperature,
                        )  # fmt: skip
                        d_error_mean *= call.loss_scale(part)
                        d_error = d_error_mean if d_error is None else d_error + d_error_mean
                        d_extra.append(d_a_loss.flatten())
                    call.zero_before_targets(d_v, part, is_empty=d_error is None)
                    if d_error is not None:
                        d_on_tokens = call.error_backward(d_error, difference, weight, part, d_on_tokens, d_v, d_gate)
                else:
                    d_v[:, part] = 0
                known, new = slice(span.entry, span.entry_new), slice(span.entry_new, span.entry_stop)
                at_new = base_row.index_select(0, plan.order[new])
                d_reads.append(dots(flat_base, at_new, d_on_tokens, plan.token[new]))
                if span.row_new > span.row:
                    at_old = plan.index.index_select(0, plan.order[known]) - span.row
                    d_reads.append(dots(old, at_old, d_on_tokens, plan.token[known]))
                # The rows that nobody touched before are the last ones.
                stop, entry_stop = (span.row_stop, span.entry_stop) if all_before else (span.row_new, span.entry_new)
                if stop > span.row:
                    here = slice(span.entry, entry_stop)
                    d_before = bag_sums(
                        d_on_tokens, plan.token[here], plan.starts[span.row : stop] - span.entry, shares.weights[here]
                    )
                    if on_before is not None:
                        d_before += on_before[: d_before.shape[0]]
                    into = places[span.row : stop]
                    d_table.index_add_(0, into, d_before)

            d_a = torch.empty_like(factors).scatter_(0, plan.order, torch.cat(d_reads[::-1]))
            if d_shares:
                d_a.index_add_(0, later.entry, later_factors * torch.cat(d_shares[::-1]))
            if d_extra:
                d_a += torch.cat(d_extra)
            d_scores = call.on_scores(choices, parts, d_a, d_weights)
            for i in reversed(range(len(parts))):
                (part, is_written), at, use = parts[i], stage.addresses[i], stage.uses[i]
                halves = call.halves(part)
                found = needed_differences(halves, at, call.room)
                if use is not None and d_now is not None and not options.value_loss_to_keys:
                    step = key_step_backward(halves, at, use, found, d_now, call.n_memories, options)
                needs_keys = need[3] or part.start > 0
                d_halves, d_before = address_backward(halves, at, found, step, d_scores[i], needs_keys, options)
                call.put_halves(d_q, d_halves, part)
                # The step hands on what came through the new keys; without it, they were the old ones.
                if d_now is not None and step is None and d_before is not None:
                    d_before += d_now
                d_now, step = d_before, None

        d_base = None
        if need[4]:
            d_base = torch.zeros_like(base)
            into = group_accesses(all_base_rows[ctx.n_given :].unsqueeze(1))
            new = d_table[ctx.n_given :]
            ones = v.new_ones(new.shape[0], 1)
            d_base.flatten(0, 1)[into.rows] = segment_sum(new, ones, into.order, into.starts)
        return (
            d_q, d_v, d_gate, d_now.view(key_shape) if need[3] and d_now is not None else None, d_base,
            d_table[: ctx.n_given] if need[5] else None, None, None, None, None, None,
        )  # fmt: skip


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
        key_shape: torch.Size,
        n_written: int,
        options: ChunkOptions,
    ) -> None:
        self.q, self.v, self.gate, self.mask = q, v, gate, mask
        self.n_memories, self.options = key_shape[0], options
        self.n_rows = q.shape[0] // self.n_memories
        self.n_read = q.shape[2] * options.top_k
        n_tokens, step = q.shape[1], options.chunk_size
        self.parts = [(slice(i, min(i + step, n_written)), True) for i in range(0, n_written, step)]
        self.n_written_chunks = len(self.parts)
        if n_written < n_tokens:
            assert n_tokens - n_written <= step, (n_tokens, n_written, step)
            self.parts.append((slice(n_written, n_tokens), False))
        # Without a reason to move, the keys stay the very same tensor.
        self.keys_move = bool(options.address_weight) or options.value_loss_to_keys
        by_chunk = options.value_loss_to_keys
        self.stages = [[one] for one in self.parts] if by_chunk else [self.parts] if self.parts else []
        # g m of every token.
        weight = v.new_ones(v.shape[:2]) if gate is None else gate
        self.weight = weight if mask is None else weight * mask
        # Where each chunk's differences are formed: the same memory for all, which need not be mapped again.
        n_most = max((part.stop - part.start for part, _ in self.parts), default=0)
        self.room = q.new_empty(q.shape[0] * n_most * self.n_read * q.shape[-1])

    def tokens(self, x: Tensor, part: slice) -> Tensor:
        """(B,T,...) -> (M*S,...)."""
        return x[:, part].flatten(0, 1)

    def halves(self, part: slice) -> Tensor:
        """The queries' halves (A,S,K/2)."""
        n_heads, key_dim = self.q.shape[2:]
        queries = self.q[:, part].reshape(self.n_memories, -1, n_heads, 2, key_dim // 2)
        return queries.permute(0, 2, 3, 1, 4).reshape(-1, queries.shape[1], key_dim // 2)

    def put_halves(self, into: Tensor, halves: Tensor, part: slice) -> None:
        """Write halves (A,S,K/2) where they belong in ``into`` (B,T,H,K)."""
        n_heads, half_dim = self.q.shape[2], halves.shape[-1]
        by_head = halves.view(self.n_memories, n_heads, 2, self.n_rows, -1, half_dim).permute(0, 3, 4, 1, 2, 5)
        by_memory = into.view(self.n_memories, self.n_rows, -1, n_heads, 2, half_dim)
        by_memory[:, :, part] = by_head

    def equal(self, parts: list[tuple[slice, bool]]) -> Iterator[range]:
        """Which of the chunks, which all are equally long but perhaps the last, can be taken together."""
        lengths = [part.stop - part.start for part, _ in parts]
        n_first = len(lengths) if lengths[-1] == lengths[0] else len(lengths) - 1
        yield range(n_first)
        if n_first < len(lengths):
            yield range(n_first, len(lengths))

    def n_accesses(self, parts: list[tuple[slice, bool]]) -> list[int]:
        """Of each chunk."""
        return [self.q.shape[0] * (part.stop - part.start) * self.n_read for part, _ in parts]

    def codes(self, choices: list[Choice], n_slots: int) -> Tensor:
        """Codes (E,) of the accesses of all chunks."""
        offsets = torch.arange(0, self.n_memories * n_slots, n_slots, device=self.q.device).view(1, -1, 1)
        by_memory = (choice.slots.reshape(len(choice.slots), self.n_memories, -1) for choice in choices)
        return torch.cat([(slots + offsets).flatten() for slots in by_memory])

    def join(self, chunks: list[Tensor], dtype: torch.dtype) -> Tensor:
        """(G,B*C,J) of chunks of equal length, for all of these -> (B,T,J)."""
        n_sequences = self.q.shape[0]
        if not chunks:
            return torch.zeros(*self.q.shape[:2], self.n_read, dtype=dtype, device=self.q.device)
        joined = [x.unflatten(1, (n_sequences, -1)).transpose(0, 1).flatten(1, 2) for x in chunks]
        return torch.cat(joined, dim=1) if len(joined) > 1 else joined[0].contiguous()

    def on_scores(
        self, choices: list[Choice], parts: list[tuple[slice, bool]], d_a: Tensor, d_weights: Tensor | None
    ) -> list[Tensor]:
        """Derivatives of each chunk's scores (A,S,k), given those of the weights of all accesses (E,), to which those
        of the call's output (B,T,J) are added."""
        found, start = [], 0
        for same, choice in zip(self.equal(parts), choices, strict=True):
            stop = start + choice.weights.numel()
            here = d_a[start:stop].view(choice.weights.shape)
            if d_weights is not None:
                part = slice(parts[same[0]][0].start, parts[same[-1]][0].stop)
                outer = d_weights[:, part].unflatten(1, (len(same), -1)).transpose(0, 1)
                here = here + outer.reshape(here.shape)
            found += choose_backward(choice, here, self.options).unbind()
            start = stop
        return found

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
        writing = slice(part.start, part.start + n_writing)
        return difference, self.weight[:, writing]

    def error_in_place(self, on_tokens: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """e (M*S,V) in the memory of what was read, so that little else goes through the caches, and
        sum g m |read - v|^2 ()."""
        n_writing = self._n_writing(part)
        error = on_tokens.view(self.q.shape[0], -1, on_tokens.shape[-1])
        error[:, :n_writing].sub_(self.v[:, part.stop - n_writing : part.stop])
        error[:, n_writing:].zero_()
        weight = self.weight[:, part]
        squares = torch.linalg.vector_norm(error, dim=-1).square_()
        error.mul_(weight.unsqueeze(-1))
        return on_tokens, torch.dot(weight.flatten(), squares.flatten())

    def error(self, difference: Tensor, weight: Tensor, part: slice) -> Tensor:
        """e (M*S,V), zero at tokens that write nothing."""
        n_writing = difference.shape[1]
        error = self.v.new_empty(self.q.shape[0], part.stop - part.start, self.v.shape[-1])
        torch.mul(difference, weight.unsqueeze(-1), out=error[:, :n_writing])
        error[:, n_writing:].zero_()
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
        """Hand on the derivative of e (M*S,V): set it in d_v (B,T,V) and d_gate (B,T), and add it to d_on_tokens
        (M*S,V) in a copy, which is returned."""
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
        torch.neg(d_difference, out=d_v[:, part.stop - n_writing : part.stop])
        d_on_tokens = d_on_tokens.clone().view(by_sequence)
        d_on_tokens[:, :n_writing] += d_difference
        return d_on_tokens.flatten(0, 1)

    def zero_before_targets(self, d_v: Tensor, part: slice, is_empty: bool) -> None:
        """Zero the derivatives of v (B,T,V) at a chunk's first tokens, whose values nothing writes; of all, if so."""
        stop = part.stop if is_empty else part.stop - self._n_writing(part)
        d_v[:, part.start : stop] = 0

    def row_factors(self, plan: Plan, spans: list[Span], parts: list[tuple[slice, bool]], n_slots: int) -> Tensor:
        """-lr * scale / cnt (E,) of each access's row."""
        factors = (-self.options.lr / plan.counts.to(self.v.dtype)).index_select(0, plan.index)
        if self.options.update_scale == "paper":
            return factors
        for same in self.equal(parts):
            first, last = parts[same[0]][0], parts[same[-1]][0]
            n_writing = self._n_writing(first)
            if not n_writing:
                continue
            n_pairs, n_chunk = self.n_rows * n_writing, first.stop - first.start
            here = factors[spans[same[0]].entry : spans[same[-1]].entry_stop]
            if self.mask is None:
                here *= self.n_read * self.n_rows * n_chunk / n_pairs
                continue
            writing = self.mask[:, first.start : last.stop].unflatten(1, (len(same), n_chunk))[:, :, :n_writing]
            n_effective = writing.to(here.dtype).sum(-1).view(self.n_memories, self.n_rows, -1).sum(1).T
            here.view(*n_effective.shape, -1).mul_(self.n_read / n_pairs * n_effective.unsqueeze(-1))
        return factors
