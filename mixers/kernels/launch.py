"""Launch a kernel with little work on the host: what was compiled is found again by a short key."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

_compiled: dict[tuple, triton.compiler.CompiledKernel] = {}


def launch(
    kernel,
    grid: tuple[int, ...],
    *args: Tensor | int | float,
    num_warps: int,
    num_stages: int = 3,
    cooperative: bool = False,
    max_registers: int | None = None,
    **constants,
):
    """Run ``kernel`` over ``grid`` (up to 3 sizes) with its arguments in order and its compile-time ``constants``.

    As ``kernel[grid](*args, **constants)``, which inspects every argument at every launch. Here the first launch with
    a key does that; the next ones hand addresses to the compiled kernel. The key holds all that Triton compiles for:
    the constants, the device, element types and 16-byte alignment of the tensors, and which integers need 64 bits. All
    integer parameters of the kernel must stand under ``do_not_specialize``.

    ``cooperative``: all programs run at once, or the launch fails; for kernels whose programs wait for one another.
    ``max_registers`` per thread: what leaves room for that many programs.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if cooperative:
        options["launch_cooperative_grid"] = True
    if max_registers is not None:
        options["maxnreg"] = max_registers
    if not isinstance(kernel, triton.JITFunction):
        # Interpreted: there is nothing compiled.
        kernel[grid](*args, **constants, **options)
        return
    values, kinds = [], []
    for value in args:
        if isinstance(value, Tensor):
            address = value.data_ptr()
            kinds.append((value.dtype, address % 16 == 0))
            value = address
        elif isinstance(value, int):
            kinds.append(value.bit_length() < 32)
        values.append(value)
    key = (id(kernel), torch.cuda.current_device(), *options.values(), *kinds, *constants.items())
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args, **constants, **options)
        return
    constant_names = kernel.arg_names[len(args) :]
    compiled[(*grid, 1, 1)](*values, *[constants[name] for name in constant_names])
