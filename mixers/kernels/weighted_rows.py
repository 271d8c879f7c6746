"""Reads of a table that nothing writes (static product-key layers), differentiable: sums and inner products of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixers.kernels.row_dots import row_dots
from mixers.kernels.row_gradients import row_gradients
from mixers.kernels.row_sums import row_sums


@torch.compiler.disable
def weighted_rows(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights_j * values[slot_j]: values (M,N,V), slots int64 and weights (M,S,J) -> (M,S,V).

    As :func:`mixers.product_keys.read`. No (M,S,J,V) tensor is formed; the derivative of a value row is summed over
    the row's accesses in the order of the tokens (one stable sort), so equal inputs give equal bits.
    """
    return _WeightedRows.apply(values, slots, weights)


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, slots, weights):
        values, slots, weights = values.contiguous(), slots.contiguous(), weights.contiguous()
        out = values.new_empty(*slots.shape[:2], values.shape[-1])
        if out.numel():
            row_sums(values, slots, weights, out)
        ctx.save_for_backward(values, slots, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        values, slots, weights = ctx.saved_tensors
        needs_values, _, needs_weights = ctx.needs_input_grad
        if not slots.numel():
            return torch.zeros_like(values), None, torch.zeros_like(weights)
        d_values, d_weights = row_gradients(
            values, slots, weights, d_out.contiguous(), sums=needs_values, dots=needs_weights
        )
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
            row_dots(values, slots, tokens, dots)
        ctx.save_for_backward(values, slots, tokens)
        return dots

    @staticmethod
    @once_differentiable
    def backward(ctx, d_dots):
        values, slots, tokens = ctx.saved_tensors
        needs_values, _, needs_tokens = ctx.needs_input_grad
        if not slots.numel():
            return torch.zeros_like(values), None, torch.zeros_like(tokens)
        d_dots = d_dots.contiguous()
        d_values = d_tokens = None
        if needs_values:
            d_values, _ = row_gradients(values, slots, d_dots, tokens, sums=True, dots=False)
        if needs_tokens:
            d_tokens = torch.empty_like(tokens)
            row_sums(values, slots, d_dots, d_tokens)
        return d_values, None, d_tokens
