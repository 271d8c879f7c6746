"""The dense baseline: the memory as autograd writes it, with a full-table gradient and a full-table update per chunk.

The algorithm of the released code, in plain torch: after each chunk's read, ``autograd.grad`` of the write's loss gives
a gradient of the whole table, which is rescaled and subtracted as a whole. Its results equal the reference's; its cost
follows the size of the table, which is what the sparse implementations are compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.fwpkm.reference import ENTROPY_EPS
from mixers.product_keys import Selection, select


def write_densely(
    q: Tensor,
    v: Tensor,
    gate: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    chunk_size: int,
    top_k: int,
    scope: str,
    lookahead: int = 1,
    lr: float = 1.0,
    address_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """read (B,T,V), keys and values with a leading M, of :func:`mixers.fwpkm.fast_weight_pkm` with these options.

    q (B,T,H,K), v (B,T,V), gate (B,T), keys (H,2,n,K/2), values (N,V). M is B (scope ``sequence``: a table for every
    sequence) or 1 (``shared``). Differentiable in q, v, gate, keys and values when gradients are enabled.
    """
    n_sequences, n_tokens, n_heads, key_dim = q.shape
    n_memories = n_sequences if scope == "sequence" else 1
    is_training = torch.is_grad_enabled()
    keys = keys.expand(n_memories, *keys.shape)
    values = values.expand(n_memories, *values.shape)
    q, v, gate = (part.reshape(n_memories, -1, *part.shape[1:]) for part in (q, v, gate))
    reads = []
    for start in range(0, n_tokens, chunk_size):
        part = slice(start, start + chunk_size)
        with torch.enable_grad():
            # A table that nobody differentiates is a leaf of this chunk's own gradient.
            keys = keys if is_training and keys.requires_grad else keys.detach().requires_grad_()
            values = values if is_training and values.requires_grad else values.detach().requires_grad_()
            queries = q[:, :, part].reshape(n_memories, -1, n_heads, key_dim)
            selection = select(queries, keys, top_k, "idw")
            slots = selection.slots.flatten(-2)
            weights = torch.softmax(selection.scores.flatten(-2), dim=-1)
            read = _gather(values, slots, weights).view(v[:, :, part].shape)

            n_writing = max(read.shape[2] - lookahead, 0)
            difference = read[:, :, :n_writing] - v[:, :, part][:, :, read.shape[2] - n_writing :]
            loss = 0.5 * (gate[:, :, part][:, :, :n_writing, None] * difference.square()).sum()
            d_values = torch.autograd.grad(loss, values, create_graph=is_training)[0]
            entropy = address_weight * _negative_entropy(selection, keys.shape[3])
            d_keys = torch.autograd.grad(entropy, keys, create_graph=is_training)[0]
        reads.append(read if is_training else read.detach())
        counts = torch.zeros_like(values[..., 0]).scatter_add_(1, slots.flatten(1), torch.ones_like(weights).flatten(1))
        with torch.set_grad_enabled(is_training):
            values = values - lr * d_values / counts.clamp(min=1).unsqueeze(-1)
            keys = keys - lr * d_keys
    return torch.cat(reads, dim=2).flatten(0, 1), keys, values


def _gather(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights_j * values[slot_j] for values (M,N,V), slots and weights (M,S,J), twice differentiable."""
    n_memories, n_slots, value_dim = values.shape
    offsets = torch.arange(n_memories, device=slots.device).view(-1, 1, 1) * n_slots
    rows = values.reshape(-1, value_dim)[slots + offsets]
    return torch.einsum("msj,msjv->msv", weights, rows)


def _negative_entropy(selection: Selection, n_subkeys: int) -> Tensor:
    """sum over memories, halves and sub-keys of Pbar log(Pbar + 1e-8): the addressing loss."""
    probability = torch.softmax(selection.half_scores, dim=-1)
    n_memories, n_queries, n_heads = probability.shape[:3]
    by_half = probability.permute(0, 3, 1, 2, 4).reshape(n_memories, 2, -1) / (n_queries * n_heads)
    index = selection.half_indices.permute(0, 3, 1, 2, 4).reshape(n_memories, 2, -1)
    mean = by_half.new_zeros(n_memories, 2, n_subkeys).scatter_add(-1, index, by_half)
    return (mean * torch.log(mean + ENTROPY_EPS)).sum()
