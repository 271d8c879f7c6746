"""Searches with several objectives or with constraints: what is wanted of a trial, read from its outcome."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from experiments.records import RunOutcome

# Measured speeds are better when higher; every other cost is better when lower.
_HIGHER_IS_BETTER = re.compile(r"cost/\w+_per_s")
_CONSTRAINT = re.compile(r"\s*((?:cost|select)/\S+)\s*(<=|>=)\s*(\S+)\s*")


@dataclass(frozen=True)
class Constraint:
    """``name <= bound``, or ``>=`` where ``sign`` is -1."""

    name: str
    sign: int
    bound: float

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """From ``"cost/params <= 1e6"``; ValueError for anything else."""
        found = _CONSTRAINT.fullmatch(text)
        try:
            bound = float(found[3]) if found else math.nan
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise ValueError(f'constraints are written "cost/params <= 1e6" or "select/accuracy >= 0.9", got {text!r}')
        return cls(found[1], 1 if found[2] == "<=" else -1, bound)

    def violation(self, outcome: RunOutcome) -> float:
        """At most 0 where it is kept; infinite where the value is not known."""
        value = value_of(outcome, self.name)
        return math.inf if value is None else self.sign * (value - self.bound)


def value_of(outcome: RunOutcome, name: str) -> float | None:
    """``cost/...`` or a metric of a finished run, where it is finite."""
    if outcome.outcome != "finished":
        return None
    is_cost = name.startswith("cost/")
    value = outcome.cost.get(name.removeprefix("cost/")) if is_cost else outcome.metrics.get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def direction_of(name: str, select_direction: str) -> str:
    """Of an objective: the select metric's own, or the better one of a cost."""
    if not name.startswith("cost/"):
        return select_direction
    return "maximize" if _HIGHER_IS_BETTER.fullmatch(name) else "minimize"


def undominated(points: list[tuple[float, ...]], directions: list[str]) -> list[int]:
    """Indices of the points that no other is at least as good as everywhere and better than somewhere."""
    signs = [1 if direction == "maximize" else -1 for direction in directions]
    better = [tuple(sign * value for sign, value in zip(signs, point, strict=True)) for point in points]

    def dominated(point: tuple[float, ...]) -> bool:
        return any(other != point and all(a >= b for a, b in zip(other, point, strict=True)) for other in better)

    return [i for i, point in enumerate(better) if not dominated(point)]


def check_objectives(objectives: tuple[str, ...], constraints: tuple[str, ...], select: str, search: Any) -> None:
    """Refuse objectives that can't be searched; ValueError says why."""
    for text in constraints:
        Constraint.parse(text)
    if constraints and search.sampler == "cmaes":
        raise ValueError("search: cmaes knows no constraints; use tpe, gp or nsgaii")
    if not objectives:
        return
    if len(objectives) < 2 or len(set(objectives)) < len(objectives) or select not in objectives:
        raise ValueError(f"search: objectives are {select!r}, which chooses, and costs, each once; got {objectives}")
    if others := [name for name in objectives if name != select and not re.fullmatch(r"cost/\w+", name)]:
        raise ValueError(f"search: objectives: {others[0]!r} is neither {select!r} nor a cost, 'cost/...'")
    if search.sampler == "cmaes":
        raise ValueError("search: cmaes knows one objective only; use tpe, gp or nsgaii")
    if search.pruner != "none":
        raise ValueError("search: a pruner compares one objective; leave the pruner or the objectives out")
