"""What all layers with a recurrent memory and kernels of flash-linear-attention have in common."""

from __future__ import annotations

import pytest
import torch

from mixers import registry
from mixers.base import state_tensors
from mixers.errors import UserError
from tests.mixers.fla_equality import assert_fla_equals_reference

NAMES = [
    "based", "delta_net", "gated_deltanet", "gla", "hgrn2", "kda", "linear_attention", "mamba2", "retention", "rwkv7",
]  # fmt: skip
every_layer = pytest.mark.parametrize("name", NAMES)
# Some kernels take half precision only.
FLA_PRECISION = {"rwkv7": (torch.bfloat16, 4e-2)}


def test_no_layer_with_such_kernels_is_left_out() -> None:
    for name in registry.names():
        field = registry.get(name).Config.model_fields.get("impl")
        assert (field is not None and "'fla'" in str(field.annotation)) == (name in NAMES), name


@every_layer
def test_padded_outputs_are_zero_and_gradients_finite(name: str) -> None:
    layer = registry.build(name, {"d_model": 16, "n_heads": 2}).double()
    x = torch.full((2, 6, 16), float("nan"), dtype=torch.float64)
    x[0, 2:4] = torch.randn(2, 16, dtype=torch.float64)
    x.requires_grad_()
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 2:4] = True
    y = layer(x, mask=mask).y
    assert torch.isfinite(y).all()
    assert (y[~mask] == 0).all()
    assert (y[mask] != 0).any()
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@every_layer
def test_chunk_size_changes_no_output_nor_gradient(name: str) -> None:
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    results = []
    for chunk_size in (64, 1, 5, 21):
        torch.manual_seed(0)
        layer = registry.build(name, {"d_model": 16, "n_heads": 2, "chunk_size": chunk_size}).double()
        leaf = x.clone().requires_grad_()
        y = layer(leaf).y
        y.square().sum().backward()
        results.append((y, leaf.grad))
    for found in results[1:]:
        for got, want in zip(found, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@every_layer
def test_memories_are_float32_for_half_inputs(name: str) -> None:
    layer = registry.build(name, {"d_model": 16, "n_heads": 2}).bfloat16()
    out = layer(torch.randn(2, 5, 16, dtype=torch.bfloat16), return_state=True)
    assert out.y.dtype == torch.bfloat16
    assert torch.isfinite(out.y).all()
    assert torch.float32 in {part.dtype for part in state_tensors(out.state)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@every_layer
def test_fla_without_a_gpu_is_an_error_with_the_way_out(name: str) -> None:
    with pytest.raises(UserError, match=r"impl='fla'.*'reference'"):
        registry.build(name, {"impl": "fla"})(torch.zeros(1, 1, 64))
    assert registry.build(name).impl == "reference"


@pytest.mark.cuda
@pytest.mark.parametrize("n_tokens", [1, 63, 130])
@every_layer
def test_fla_equals_the_reference(name: str, n_tokens: int) -> None:
    pytest.importorskip("triton")
    dtype, tolerance = FLA_PRECISION.get(name, (torch.float32, 1e-2))
    assert_fla_equals_reference(name, n_tokens, dtype, tolerance=tolerance)
