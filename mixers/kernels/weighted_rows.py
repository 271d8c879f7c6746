"""Reads of a table that nothing writes (static product-key layers), differentiable: sums and inner products of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixers.kernels.chunk import Chunk
from mixers.kernels.groups import group_accesses
from mixers.kernels.read import read_rows
from mixers.kernels.row_dots import row_dots
from mixers.kernels.update import add_rows


@torch.compiler.disable
def weighted_rows(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights_j * values[slot_j]: values (M,N,V), slots int64 and weights (M,S,J) -> (M,S,V).

    As :func:`mixers.product_keys.read`. No (M,S,J,V) tensor is formed; the derivative of a value row is summed by one
    program over the row's accesses in the order of the tokens (one stable sort), so equal inputs give equal bits.
    """
    return _WeightedRows.apply(values, slots, weights)


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, slots, weights):
        values, slots, weights = values.contiguous(), slots.contiguous(), weights.contiguous()
        out = values.new_empty(*slots.shape[:2], values.shape[-1])
        if out.numel():
            read_rows(values, slots, weights, out, _whole(slots))
        ctx.save_for_backward(values, slots, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        values, slots, weights = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_values = d_weights = None
        if ctx.needs_input_grad[0]:
            d_values = torch.zeros_like(values)
            if slots.numel():
                groups = group_accesses(slots.unsqueeze(1), values.shape[1], slots.shape[1])
                add_rows(d_values, d_out, weights, groups, _whole(slots))
        if ctx.needs_input_grad[2]:
            d_weights = torch.empty_like(weights)
            if slots.numel():
                row_dots(values, slots, d_out, d_weights, _whole(slots))
        return d_values, None, d_weights


@torch.compiler.disable
def dotted_rows(values: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    """<values[slot_j], tokens>: values (M,N,V), slots int64 (M,S,J) and tokens (M,S,V) -> (M,S,J).

    As :func:`mixers.product_keys.dot_rows`, of the same kernels as :func:`weighted_rows`, in the other direction.
    """
    return _DottedRows.apply(values, slots, tokens)


class _DottedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, slots, tokens):
        values, slots, tokens = values.contiguous(), slots.contiguous(), tokens.contiguous()
        dots = tokens.new_empty(slots.shape)
        if slots.numel():
            row_dots(values, slots, tokens, dots, _whole(slots))
        ctx.save_for_backward(values, slots, tokens)
        return dots

    @staticmethod
    @once_differentiable
    def backward(ctx, d_dots):
        values, slots, tokens = ctx.saved_tensors
        d_dots = d_dots.contiguous()
        d_values = d_tokens = None
        if ctx.needs_input_grad[0]:
            d_values = torch.zeros_like(values)
            if slots.numel():
                groups = group_accesses(slots.unsqueeze(1), values.shape[1], slots.shape[1])
                add_rows(d_values, tokens, d_dots, groups, _whole(slots))
        if ctx.needs_input_grad[2]:
            d_tokens = torch.empty_like(tokens)
            if slots.numel():
                read_rows(values, slots, d_dots, d_tokens, _whole(slots))
        return d_values, None, d_tokens


def _whole(slots: Tensor) -> Chunk:
    """All S tokens of each memory as one chunk of one sequence."""
    n_memories, n_queries, _ = slots.shape
    return Chunk(n_memories, 1, n_queries, 0, n_queries)
