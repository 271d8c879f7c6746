"""torch without what a training that isn't compiled has no use for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def spare_compiler() -> None:
    """Let AdamW work without torch's compiler, whose import takes seconds and some hundred megabytes of each process.

    ``torch.optim`` imports it at the first step, to except its own methods from compilation: here these are called as
    they are, ``step`` with gradients only where ``differentiable`` asks for them, as before. What they compute stays
    the same, bit for bit, and so does a model that is compiled: no optimiser is part of it.
    """
    import torch
    from torch.optim import AdamW, Optimizer

    step = getattr(AdamW.step, "__wrapped__", None)  # the method below its decorator
    if step is not None:

        def spared(self: AdamW, closure: Callable[[], Any] | None = None) -> Any:
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                return step(self, closure)

        AdamW.step = spared
    for name in ("state_dict", "load_state_dict", "zero_grad", "add_param_group"):
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if method is not None:
            setattr(Optimizer, name, method)
