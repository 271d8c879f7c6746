"""``python -m tests.mixers.interpreter MODULE ARGS`` or ``-c CODE``: in triton's interpreter, in a third of the time.

At each call of one jit function by another triton puts its interpreted operations in place of the compiled ones again,
though they are there from the kernel's start to its end; finding out takes longer than the calls themselves.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def interpreted(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a module in a process of its own: whether kernels are interpreted is decided when triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "tests.mixers.interpreter", *words],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def put_in_place_once() -> None:
    from triton import language
    from triton.runtime import interpreter

    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope")):
        return  # a version of triton that does it otherwise
    put_in_place = interpreter._patch_lang

    def is_lacking(function: Callable[..., Any]) -> bool:
        modules = [value for value in function.__globals__.values() if isinstance(value, ModuleType)]
        return any(m in (language, language.core) and language.core.is_builtin(m.load) for m in modules)

    def once(function: Callable[..., Any]) -> Any:
        return put_in_place(function) if is_lacking(function) else interpreter._LangPatchScope()

    interpreter._patch_lang = once


def main() -> None:
    put_in_place_once()
    module, *sys.argv[1:] = sys.argv[1:]
    if module == "-c":
        exec(sys.argv[1], {"__name__": "__main__"})
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
