"""The shipped contract suite on CUDA: every registered mixer, with every implementation that it has there."""

from __future__ import annotations

import typing

import pytest
import torch

from mixers import contract, registry
from mixers.implementations import FLA_MISSING, FLASH_ATTN_MISSING, TRITON, TRITON_MISSING
from tests.mixers.fla_equality import skip_where_refused

pytestmark = pytest.mark.cuda

D = 64
# Kernels compute in less than float64; some in half precision only.
KERNEL_DTYPES = {("rwkv7", "fla"): torch.bfloat16, ("softmax", "flash_attn"): torch.bfloat16}
MISSING = {"fla": FLA_MISSING, "flash_attn": FLASH_ATTN_MISSING, "triton": TRITON_MISSING}
# Small, as in the tests on the CPU: (mixer, options).
SMALL = {
    "pkm": {"n_subkeys": 8, "key_dim": 8, "value_dim": 16, "top_k": 4},
    "peer": {"n_subkeys": 8, "key_dim": 8, "top_k": 4},
}
# fla's kernels work in chunks of 64, whatever ``chunk_size`` says.
FLA_CHUNK = 64
ANY_ORDER = "sums on CUDA are taken in the order in which threads arrive"
QUERY_BLOCKS = "softmax attention works in query blocks longer than the window, and 0 * NaN is NaN"
ONE_PRODUCT = "all queries of a call share one product with the values, and 0 * NaN is NaN"
WIDE_TABLES = "its kernels read tables of float32 and float64; one of bfloat16 weights is refused by name"
# By (mixer, implementation): what such a kernel may fail, and why.
EXCUSES: dict[tuple[str, str], dict[str, str]] = {
    ("based", "reference"): {"nan_in_future": QUERY_BLOCKS},
    ("lact", "reference"): {"nan_in_future": ONE_PRODUCT},
    ("gated_deltanet", "fla"): {
        "twin": "fla sums the gradient of a head's decay from products of rounded factors that nearly cancel"
    },
    ("pkm", "triton"): {"shapes": WIDE_TABLES},
    ("peer", "triton"): {"shapes": WIDE_TABLES},
    ("fwpkm", "reference"): {"determinism": ANY_ORDER, "state_dict": ANY_ORDER},
}
# Wrong numbers from torch.compile of plain torch on CUDA, with this pair of versions; right with triton 3.6.
if torch.__version__.startswith("2.11.") and TRITON is not None and TRITON >= (3, 7):
    COMPILER = "torch 2.11's compiler, made for triton 3.6, miscomputes its running decays with triton 3.7"
    EXCUSES |= {(name, "reference"): {"compile": COMPILER} for name in ("gla", "hgrn2")}


def implementations(name: str) -> list[str]:
    """Values of the option ``impl``, but ``auto``; those without the option have the one."""
    field = registry.get(name).Config.model_fields.get("impl")
    if field is None:
        return ["reference"]
    return [value for value in typing.get_args(field.annotation) if value != "auto"]


CASES = [(name, impl) for name in registry.names() for impl in implementations(name)]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize(("name", "impl"), [pytest.param(n, i, id=f"{n}-{i}") for n, i in CASES])
def test_contract(name: str, impl: str, check: str) -> None:
    if MISSING.get(impl):
        pytest.skip(f"needs the package {' and '.join(MISSING[impl])}")
    cls = registry.get(name)
    options = {"d_model": D, **SMALL.get(name, {})}
    if "impl" in cls.Config.model_fields:
        options["impl"] = impl
    if impl == "fla" and "chunk_size" in cls.Config.model_fields:
        options["chunk_size"] = FLA_CHUNK
    dtype = KERNEL_DTYPES.get((name, impl), torch.float32 if impl in ("fla", "triton") else torch.float64)
    skip_where_refused(name, options, dtype)
    contract.require(
        check,
        lambda: registry.build(name, options),
        excuses={**contract.declared_excuses(cls), **EXCUSES.get((name, impl), {})},
        device="cuda",
        dtype=dtype,
    )
