"""The code that decides a run's result, as part of its key: layers, model, task, training, evaluation, costs."""

from __future__ import annotations

import functools
from typing import Any

from experiments.pattern import parse_pattern

# What a run passes through that leaves its numbers as they are: bookkeeping, tracking, messages.
NEUTRAL = frozenset(
    f"experiments.{name}"
    for name in (
        "checkpoint",
        "environment",
        "errors",
        "paths",
        "progress",
        "records",
        "run_lock",
        "source",
        "tracking",
        "turns",
    )
)
TASKS = frozenset({"experiments.tasks.mqar", "experiments.tasks.text"})


@functools.cache
def run_code(pattern: str, task_module: str) -> dict[str, Any]:
    """File -> hash for this project's files that differ from the release, mixer -> hash for layers from elsewhere.

    Empty for an installed release that nobody has edited: there the version of results in the config stands for it.
    """
    from mixers import registry, source

    classes = {name: registry.get(name) for name in parse_pattern(pattern).mixer_names()}
    neutral = NEUTRAL | source.NEUTRAL | (TASKS - {task_module})
    code = source.own_code(frozenset({"experiments.run", task_module}), neutral)
    for cls in classes.values():
        code = {**code, **source.mixer_code(cls)}
    foreign = {name: hashed for name, cls in classes.items() if (hashed := source.foreign_code(cls))}
    return {**dict(sorted(code.items())), **foreign}
