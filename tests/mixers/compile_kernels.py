"""Compile each kernel of mixers.kernels for sm_90 and print its shared memory.

A program of its own (``python tests/mixers/compile_kernels.py``), run by test_kernels_compile.py. The launchers
choose the block sizes: each kernel is replaced by a recorder that compiles what it is launched with, on meta tensors.
"""

from __future__ import annotations

import importlib

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.bool: "*i1",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}


class Recorder:
    """Stands for a kernel and compiles what it is launched with."""

    def __init__(self, kernel) -> None:
        self.kernel, self.name = kernel, kernel.__name__

    def __getitem__(self, grid):
        assert all(size > 0 for size in grid), grid
        return self.compile

    def compile(
        self, *args, num_warps=4, num_stages=3, launch_cooperative_grid=False, maxnreg=None, **constants
    ) -> None:
        names = [name for name in self.kernel.arg_names if name not in constants]
        assert len(names) == len(args), (self.name, names)
        signature = {name: _type_of(value) for name, value in zip(names, args, strict=True)}
        signature |= dict.fromkeys(constants, "constexpr")
        ordered = {name: signature[name] for name in self.kernel.arg_names}
        attributes = {
            (self.kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*")
        }
        compiled = triton.compile(
            ASTSource(fn=self.kernel, signature=ordered, constexprs=constants, attrs=attributes),
            target=TARGET,
            options={
                "num_warps": num_warps,
                "num_stages": num_stages,
                "launch_cooperative_grid": launch_cooperative_grid,
                "maxnreg": maxnreg,
            },
        )
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 227 * 1024, (self.name, compiled.metadata.shared)
        print(f"{self.name}: {num_warps} warps, {compiled.metadata.shared} B shared", constants.get("BLOCK_S", ""))
        DONE.add(self.name)


DONE: set[str] = set()


def _type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def launch_all(heads: int, top_k: int, n: int, key_dim: int, value_dim: int, score: str, address_weight: float) -> None:
    """Every launcher of the fast-weight and the static memory, once."""
    from mixers.kernels import (
        address,
        key_chain,
        key_chain_backward,
        row_dots,
        row_gradients,
        row_steps,
        row_sums,
        value_chain,
        value_chain_backward,
        versions,
    )

    def real(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    def whole(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(*shape, device="meta", dtype=dtype)

    tokens, reads = (1, 8, 4096), heads * top_k
    n_accesses = 8 * 4096 * reads
    q, keys = real(*tokens, heads, key_dim), real(9, 1, heads, 2, n, key_dim // 2)
    table, row = real(1, n * n, value_dim), real(*tokens, value_dim)
    listed, joint = real(*tokens, heads, 2, top_k), real(*tokens, reads)
    indices, pairs = whole(*listed.shape, dtype=torch.int32), whole(*joint.shape, dtype=torch.int32)
    slots, each = whole(*joint.shape), real(*tokens)
    mean, totals, kept = real(8, 1, 2, n), real(8, 1, heads, 2, n), real(n_accesses, value_dim)
    work = key_chain.KeyWork(q, keys, indices, listed, listed, mean, totals, 512, score, 1.0, address_weight)
    key_chain.key_chain(work)
    key_chain_backward.key_chain_backward(
        q, keys, keys[0], indices, listed, listed, listed, mean, totals, q, 512, score, 1.0, address_weight,
        needs_keys=True,
    )  # fmt: skip
    address.combine(indices, listed, pairs, slots, joint, n, score, 1.0)
    # With the smallest sizes the variants for a prefill and for tables that go on.
    is_small = n < 64
    mask = whole(*each.shape, dtype=torch.bool) if is_small else None
    accesses = versions.find_versions(slots, joint, real(8, 1), n * n, 512)
    value_work = value_chain.ValueWork(
        table, None if is_small else kept, slots, joint, row, each, mask, accesses, row, each,
        None if is_small else row, 512, 1,
    )  # fmt: skip
    value_chain.value_chain(value_work)
    value_chain_backward.value_chain_backward(
        kept, table if is_small else None, table, kept, slots, joint, pairs, accesses, row, row, each, mask, row,
        joint if is_small else None, 1.0, row, each, listed, 512, 1, given=is_small, needs_table=is_small,
    )  # fmt: skip
    row_steps.last_rows(table, slots, kept, row, accesses, table)
    if not is_small:
        in_parts(q, indices, listed, slots, joint, row, each, keys[:1], mean, totals[:0], table, score)
    slots, joint, row = (part.flatten(1, 2) for part in (slots, joint, row))
    row_sums.row_sums(table, slots, joint, row)
    row_dots.row_dots(table, slots, row, joint)
    row_gradients.row_gradients(table, slots, joint, row, sums=True, dots=True)


def in_parts(q, indices, listed, slots, joint, row, each, keys, mean, totals, table, score: str) -> None:
    """The chains of one sequence: short lists of queries, the values beside the keys."""
    from mixers.kernels import both_chains, key_chain, value_chain, versions

    q, indices, listed, slots, joint, row, each = (
        part[:, :1] for part in (q, indices, listed, slots, joint, row, each)
    )
    key_part = key_chain.KeyWork(q, keys, indices, listed, listed, mean, totals, 512, score, 1.0, 1.0)
    accesses = versions.find_versions(slots, joint, torch.empty(8, 1, device="meta"), table.shape[1], 512)
    value_part = value_chain.ValueWork(table, None, slots, joint, row, each, None, accesses, row, each, None, 512, 1)
    key_chain.key_chain(key_part)
    both_chains.both_chains(key_part, value_part, goes_on=True)


def main() -> None:
    for module in (
        "address",
        "both_chains",
        "key_chain",
        "key_chain_backward",
        "row_dots",
        "row_gradients",
        "row_steps",
        "row_sums",
        "value_chain",
        "value_chain_backward",
        "versions",
    ):
        place = importlib.import_module(f"mixers.kernels.{module}")
        for name, value in list(vars(place).items()):
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
                setattr(place, name, Recorder(value))
    launch_all(heads=1, top_k=8, n=512, key_dim=512, value_dim=512, score="idw", address_weight=1.0)
    launch_all(heads=2, top_k=3, n=33, key_dim=6, value_dim=5, score="dot", address_weight=1.0)
    launch_all(heads=2, top_k=3, n=33, key_dim=6, value_dim=5, score="idw", address_weight=0.0)
    print(f"{len(DONE)} kernels")


if __name__ == "__main__":
    main()
