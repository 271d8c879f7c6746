"""Triton kernels as the first of their configurations that fits, for when tuning takes longer than is worth it."""

from __future__ import annotations

from typing import Any


def take_the_first_configuration() -> None:
    """From now on no kernel is tuned in this process: dozens of configurations, each compiled, take minutes a layer.

    Results are as right, times are not the best: tuned kernels differ in tile sizes and stages.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.errors import OutOfResources

    tune = Autotuner.run

    def run(self: Autotuner, *args: Any, **options: Any) -> Any:
        every = self.configs
        try:
            # A larger call may not fit what a smaller one did: each starts from the first.
            for config in every[:-1]:
                self.configs = [config]
                try:
                    return tune(self, *args, **options)
                except OutOfResources:
                    continue
            self.configs = every[-1:]
            return tune(self, *args, **options)
        finally:
            self.configs = every

    Autotuner.run = run
