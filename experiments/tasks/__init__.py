"""Tasks by the name in their config. Each holds NumPy data only, a pure function of config, seed and split."""

from __future__ import annotations

from experiments.tasks.base import Task, TaskConfig


def build_task(config: TaskConfig, data_seed: int) -> Task:
    """The task that ``config`` describes, with the data of ``data_seed``.

    Raises UserError where the data that it names can't be had.
    """
    from experiments.tasks.mqar import MQARConfig, MQARTask
    from experiments.tasks.text import TextConfig, TextTask

    if isinstance(config, MQARConfig):
        return MQARTask(config, data_seed)
    if isinstance(config, TextConfig):
        return TextTask(config, data_seed)
    raise AssertionError(f"no task takes a {type(config).__name__}")
