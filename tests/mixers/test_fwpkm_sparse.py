"""The sparse fast-weight memory against the readable one: outputs, memory, and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixers.errors import UserError
from mixers.fwpkm import fast_weight_pkm
from tests.mixers.test_fwpkm import draw


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.fixed_dictionaries(
        {"B": st.integers(1, 3), "T": st.integers(0, 19), "H": st.integers(1, 2), "V": st.integers(1, 5)}
    ),
    chunk_size=st.integers(1, 8),
    top_k=st.integers(1, 6),
    options=st.fixed_dictionaries(
        {
            "scope": st.sampled_from(["sequence", "shared"]),
            "update_scale": st.sampled_from(["paper", "released"]),
            "lookahead": st.integers(0, 2),
            "score": st.sampled_from(["idw", "dot"]),
            "temperature": st.sampled_from([0.5, 1.0]),
            "address_weight": st.sampled_from([0.0, 0.7]),
            "value_loss_to_keys": st.booleans(),
            "clip": st.booleans(),
        }
    ),
    with_mask=st.booleans(),
    with_gate=st.booleans(),
)
def test_equals_the_reference(sizes, chunk_size, top_k, options, with_mask, with_gate) -> None:
    mask = torch.arange(sizes["B"] * sizes["T"]).view(sizes["B"], sizes["T"]) % 4 != 1 if with_mask else None
    results = {}
    for impl in ("reference", "sparse"):
        x = draw(**sizes)
        if not with_gate:
            x["gate"] = None
        out = fast_weight_pkm(**x, chunk_size=chunk_size, top_k=top_k, mask=mask, impl=impl, **options)
        found = (out.read, out.keys, out.values, out.weights)
        generator = torch.Generator().manual_seed(5)
        total = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in found)
        tensors = [tensor for tensor in x.values() if tensor is not None]
        gradients = torch.autograd.grad(total, tensors, materialize_grads=True)
        assert torch.equal(out.slots, results["reference"][1]) if results else True
        results[impl] = ([*found, out.value_loss, out.address_loss, *gradients], out.slots)
    for got, want in zip(results["sparse"][0], results["reference"][0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


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
