"""The sparse fast-weight memory: what it refuses. Equality with the reference: ``test_fwpkm_random.py``."""

from __future__ import annotations

import pytest
import torch

from mixers.errors import UserError
from mixers.fwpkm import fast_weight_pkm
from tests.mixers.test_fwpkm import draw


def test_weight_decay_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"weight_decay=0.1 moves every row"):
        fast_weight_pkm(**draw(), chunk_size=7, top_k=3, weight_decay=0.1, impl="sparse")


def test_there_is_no_second_derivative() -> None:
    x = draw()
    read = fast_weight_pkm(**x, chunk_size=7, top_k=3, impl="sparse").read
    (first,) = torch.autograd.grad(read.square().sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_values_changed_in_place_before_they_are_read_are_an_error() -> None:
    x = {name: tensor.detach() for name, tensor in draw().items()}
    out = fast_weight_pkm(**x, chunk_size=7, top_k=3, impl="sparse")
    x["values"].add_(1)
    with pytest.raises(UserError, match="changed in place"):
        _ = out.values
