"""Which implementation of FwPKM runs, and what is said when the one asked for can't."""

from __future__ import annotations

import os

import pytest
import torch

from mixers.errors import UserError
from mixers.fwpkm import FastWeightPKM, fast_weight_pkm
from mixers.fwpkm.functional import choose_impl
from mixers.fwpkm.reference import ChunkOptions
from mixers.implementations import TRITON_MISSING
from tests.mixers.interpreter import interpreted
from tests.mixers.test_fwpkm import LAYER, draw


def chosen(n: int, value_dim: int, scope: str = "shared", **changes) -> str:
    """What ``auto`` takes on CUDA."""
    usual = {
        "chunk_size": 16, "top_k": 4, "lookahead": 1, "lr": 1.0, "weight_decay": 0.0, "score": "idw",
        "temperature": 1.0, "address_weight": 1.0, "value_loss_to_keys": False, "clip": False, "update_scale": "paper",
    }  # fmt: skip
    options = ChunkOptions(**(usual | changes))
    device = torch.device("cuda")
    return choose_impl("auto", options, (n * n, value_dim), scope=scope, device=device, dtype=torch.float32, place="m")


def test_auto_on_cuda_copies_no_large_table_for_every_sequence() -> None:
    assert chosen(1025, 512, "sequence") == "sparse"
    assert chosen(129, 512, "sequence", clip=True) == "sparse"
    # No sparse form either.
    assert chosen(1025, 512, "sequence", weight_decay=0.1) == "reference"


@pytest.mark.skipif(not TRITON_MISSING, reason="triton is installed")
def test_without_triton_auto_on_cuda_is_sparse() -> None:
    assert chosen(32, 64) == chosen(512, 512) == chosen(128, 512, "sequence") == "reference"
    assert chosen(512, 512, "sequence") == "sparse"
    assert chosen(512, 512, "sequence", weight_decay=0.1) == "reference"


@pytest.mark.skipif(bool(TRITON_MISSING), reason="needs triton")
def test_auto_on_cuda_is_triton_where_it_has_kernels() -> None:
    assert chosen(512, 512) == chosen(1024, 512, "sequence") == "triton"
    assert chosen(32, 64, clip=True) == "reference"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton runs on the CPU here")
def test_triton_on_the_cpu_is_one_clear_line() -> None:
    reason = "not installed; .*pip install triton" if TRITON_MISSING else "tensors on cpu: the kernels run on cuda"
    message = f"impl='triton' can't run here: .*{reason}; or use impl='auto', 'sparse' or 'reference'"
    with pytest.raises(UserError, match=f"^fast_weight_pkm: {message}"):
        fast_weight_pkm(**draw(), chunk_size=7, top_k=3, impl="triton")
    m = FastWeightPKM(FastWeightPKM.Config(**LAYER, impl="triton"))
    with pytest.raises(UserError, match=f"^mixer 'fwpkm': {message}"):
        _ = m.impl
    with pytest.raises(UserError, match="mixer 'fwpkm'") as caught:
        m(torch.randn(1, 3, 10))
    assert "\n" not in str(caught.value)


IN_THE_INTERPRETER = """
import torch
from mixers.fwpkm import FastWeightPKM, fast_weight_pkm
from tests.mixers.test_fwpkm import LAYER, draw

def same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

for scope in ("sequence", "shared"):
    found = []
    for impl in ("reference", "triton"):
        x = draw(B=2, T=5)
        out = fast_weight_pkm(**x, chunk_size=2, top_k=3, scope=scope, impl=impl)
        loss = out.read.square().sum() + out.values.square().sum() + out.keys.square().sum()
        found.append((out.read, out.keys, out.values, *torch.autograd.grad(loss, list(x.values()))))
    same(found[1], found[0])
    found = []
    for impl in ("reference", "triton"):
        torch.manual_seed(0)
        layer = FastWeightPKM(FastWeightPKM.Config(**LAYER | {"chunk_size": 2}, scope=scope, impl=impl)).double()
        assert layer.impl == impl
        x = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
        first = layer(x[:, :3], return_state=True)
        second = layer(x[:, 3:], first.state, return_state=True)
        y = torch.cat([first.y, second.y], 1)
        found.append((y, *layer.tables(second.state), *torch.autograd.grad(y.square().sum(), x)))
    same(found[1], found[0])
print("same")
"""


@pytest.mark.skipif(bool(TRITON_MISSING), reason="triton is not installed")
def test_triton_by_name_equals_the_reference_in_the_interpreter() -> None:
    done = interpreted("-c", IN_THE_INTERPRETER)
    assert done.stdout.strip() == "same", done.stderr[-2000:]
