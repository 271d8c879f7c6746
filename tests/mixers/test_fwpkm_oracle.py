"""Product-key memories against expected values: forward, memory after the call, every gradient, two precisions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mixers.fwpkm import FastWeightPKM, fast_weight_pkm
from mixers.pkm import ProductKeyMemory

ORACLE = Path(__file__).parent.parent / "data" / "oracle"
DTYPES = [torch.float64, torch.float32]


class Case:
    """One file of expected values."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.arrays = dict(np.load(ORACLE / f"{name}.npz"))
        self.info = json.loads(str(self.arrays["cfg"]))
        self.cfg = self.info["cfg"]
        self.dtype = dtype

    def input(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[f"in_{name}"]).to(self.dtype).requires_grad_()

    def check(self, name: str, actual: torch.Tensor | None) -> None:
        """Compare with out_<name>: 1e-12 relative in float64, max(2e-5 of the largest, 20 err32) in float32."""
        expected = torch.from_numpy(self.arrays[f"out_{name}"]).double()
        assert actual is not None, f"{name}: no value"
        actual = actual.detach().double().reshape(expected.shape)
        assert torch.isfinite(actual).all(), f"{name}: not finite"
        largest = expected.abs().max().item()
        if self.dtype == torch.float64:
            bound = 1e-12 * max(largest, 1.0)
        else:
            bound = max(2e-5 * largest, 20 * float(self.arrays.get(f"err32_{name}", 0.0)))
        error = (actual - expected).abs().max().item()
        assert error <= bound, f"{name}: off by {error:.3g}, allowed {bound:.3g}"

    def check_reads(self, slots: torch.Tensor, weights: torch.Tensor) -> None:
        """Slots and weights as sets per token: ties may come in another order."""
        want = torch.from_numpy(self.arrays["out_indices"]).flatten(2)
        got, order = slots.flatten(2).sort(dim=-1, stable=True)
        assert torch.equal(got, want.sort(dim=-1).values)
        if "out_scores" in self.arrays:
            expected = torch.from_numpy(self.arrays["out_scores"]).flatten(2)
            expected = expected.gather(-1, want.sort(dim=-1, stable=True).indices)
            actual = weights.flatten(2).gather(-1, order).double()
            bound = 1e-12 if self.dtype == torch.float64 else max(2e-5, 20 * float(self.arrays["err32_scores"]))
            assert (actual - expected).abs().max() <= bound

    def has(self, name: str) -> bool:
        return f"out_{name}" in self.arrays


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["base", "base_eval", "heads4", "lookahead0", "no_gates", "tail"])
@pytest.mark.parametrize("impl", ["reference", "sparse"])
def test_fast_weight_pkm(impl: str, name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    cfg = case.cfg
    n_heads, n, key_dim = cfg["mem_heads"], cfg["mem_n_subkeys"], cfg["mem_k_dim"]
    n_sequences, n_tokens = case.info["B"], case.info["T"]
    q, v, keys, values = (case.input(part) for part in ("q", "ref_v", "keys", "values"))
    gate = case.input("gates") if "in_gates" in case.arrays else None
    out = fast_weight_pkm(
        q.view(n_sequences, n_tokens, n_heads, key_dim),
        v,
        gate,
        keys.view(n_heads, 2, n, key_dim // 2),
        values,
        chunk_size=case.info["chunk_size"],
        top_k=cfg["mem_topk"],
        lookahead=cfg["lookahead"],
        scope="shared",
        update_scale="released",
        impl=impl,
    )
    case.check("output", out.read)
    case.check("keys_out", out.keys)
    case.check("values_out", out.values)
    case.check("addr_loss", out.address_loss)
    case.check_reads(out.slots, out.weights)
    expected_loss = 0.5 * case.arrays["out_losses"].mean()
    assert out.value_loss.item() == pytest.approx(expected_loss, rel=1e-12 if dtype == torch.float64 else 2e-5)
    if case.info["kind"] == "train":
        (out.read * case.input("cot")).sum().backward()
        grads = {"d_q": q, "d_ref_v": v, "d_gates": gate, "d_keys": keys, "d_values": values}
        for label, tensor in grads.items():
            if case.has(label):
                case.check(label, tensor.grad)
            elif tensor is not None and tensor.grad is not None:
                assert tensor.grad.abs().max() == 0, f"{label} should be zero"


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
def test_fast_weight_layer(dtype: torch.dtype) -> None:
    case = Case("block", dtype)
    cfg = case.cfg
    layer = FastWeightPKM(
        FastWeightPKM.Config(
            d_model=cfg["hidden"],
            n_heads=cfg["heads"],
            top_k=cfg["topk"],
            n_subkeys=cfg["n_subkeys"],
            key_dim=cfg["k_dim"],
            value_dim=cfg["v_dim"],
            chunk_size=case.info["chunk_size"],
            scope="shared",
            update_scale="released",
            initial_memory="learned",
            gate_outputs=8,
        )
    ).to(dtype)
    names = {
        "q_norm.weight": "fw_q_norm.weight",
        "q_proj.weight": "fw_q_proj.weight",
        "q_proj.bias": "fw_q_proj.bias",
        "v_norm.weight": "fw_v_norm.weight",
        "v_proj.weight": "fw_v_proj.weight",
        "v_proj.bias": "fw_v_proj.bias",
        "keys": "fwpkm.keys",
        "values": "fwpkm.values",
        "gate_norm.weight": "fw_out_gate_norm.weight",
        "gate_proj.weight": "fw_out_gate.weight",
        "gate_proj.bias": "fw_out_gate.bias",
        "out_norm.weight": "fw_out_norm.weight",
        "out_proj.weight": "fw_out_proj.weight",
        "out_proj.bias": "fw_out_proj.bias",
    }
    parameters = dict(layer.named_parameters())
    assert set(parameters) == set(names)
    with torch.no_grad():
        for ours, theirs in names.items():
            parameters[ours].copy_(case.input(f"p_{theirs}").view(parameters[ours].shape))
    x = case.input("hidden")
    out = layer(x, return_state=True)
    case.check("fwpkm_output", out.y)
    case.check("hidden_out", x + out.y)
    keys, values = layer.tables(out.state)
    case.check("keys_out", keys)
    case.check("values_out", values)
    ((x + out.y) * case.input("cot")).sum().backward()
    case.check("d_hidden", x.grad)
    for ours, theirs in names.items():
        case.check(f"d_{theirs}", parameters[ours].grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
def test_static_pkm(dtype: torch.dtype) -> None:
    case = Case("pkm_swilu", dtype)
    cfg = case.cfg
    layer = ProductKeyMemory(
        ProductKeyMemory.Config(
            d_model=cfg["hidden"],
            n_heads=cfg["heads"],
            top_k=cfg["knn"],
            n_subkeys=cfg["n_subkeys"],
            key_dim=cfg["k_dim"],
            value_dim=cfg["v_dim"],
            query_norm="rms_float32",
        )
    ).to(dtype)
    names = {
        "keys": "keys",
        "values": "values.weight",
        "out_proj.weight": "value_proj.weight",
        "out_proj.bias": "value_proj.bias",
        "gate_proj.weight": "swilu_projection.weight",
        "gate_proj.bias": "swilu_projection.bias",
        "q_proj.weight": "query_proj.query_mlps.0.weight",
        "q_proj.bias": "query_proj.query_mlps.0.bias",
        "q_norm.weight": "query_proj.norm.weight",
    }
    parameters = dict(layer.named_parameters())
    assert set(parameters) == set(names)
    with torch.no_grad():
        for ours, theirs in names.items():
            parameters[ours].copy_(case.input(f"p_{theirs}").view(parameters[ours].shape))
    x = case.input("input")
    y = layer(x).y
    case.check("output", y)
    (y * case.input("cot")).sum().backward()
    case.check("d_input", x.grad)
    for ours, theirs in names.items():
        case.check(f"d_{theirs}", parameters[ours].grad)
