"""The package ``fast-weight-product-key-memory``, called at our sizes as far as its options go."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from experiments.bench.case import Case
from experiments.errors import UserError

MODULE = "fast_weight_product_key_memory"
INSTALL = "pip install 'mixlab[bench]' (fast-weight-product-key-memory)"
DIFFERENCES = (
    "the package differs: one memory per sequence only; an initial table that is learned, beside a fast one of equal "
    "size; two queries of K/2 from two projections; value loss to keys on; addressing weight 1 set, its default is 10; "
    "targets wrap around in a chunk; a boundary embedding; each chunk is addressed again when it is written; slots' "
    "errors are averaged, as with update_scale=paper"
)


def is_installed() -> bool:
    return importlib.util.find_spec(MODULE) is not None


def package_layer(case: Case, d_model: int) -> torch.nn.Module:
    """Its layer with one head and C, n*n slots, K, V and k of ``case``. Its ``dim_queries_keys`` is a half's width."""
    if not is_installed():
        raise UserError(f"bench: impl=package: not installed; {INSTALL}")
    try:
        from fast_weight_product_key_memory import fwPKM
    except ImportError as error:
        raise UserError(f"bench: impl=package: can't be imported ({error}); {INSTALL}") from None

    layer = fwPKM(
        d_model,
        heads=1,
        chunk_size=case.chunk,
        num_memories=case.n**2,
        dim_queries_keys=case.key_dim // 2,
        dim_values=case.value_dim,
        topk=case.top_k,
        addressing_loss_weight=1.0,
    )
    return layer.to(case.device)


def package_decode(layer: torch.nn.Module, past: Tensor, token: Tensor) -> Callable[[], object]:
    """One token (B,1,D) after ``past`` (B,T,D)."""
    with torch.no_grad():
        _, state = layer(past, return_next_memories=True)

    @torch.no_grad()
    def one() -> object:
        return layer(token, return_next_memories=True, past_memories=state)

    return one
