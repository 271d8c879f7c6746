"""Search spaces of nuisance settings, and fixed designs over them that depend on nothing but the sweep file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from pydantic import model_validator

from mixers.config import StrictModel

DESIGNS = ("spread", "random", "qmc", "grid")  # searches that are known before anything runs
Scalar = bool | int | float | str
# Fixes the shift of the quasi-random design and the draws of the random one. Changing it changes every tuning run.
DESIGN_SEED = 20_210_601
# A design of distinct settings gives up after so many draws per trial: small discrete spaces repeat themselves.
DRAWS_PER_TRIAL = 64


class SearchSpace(StrictModel):
    """The values that one setting may take: exactly one of the four kinds."""

    log_uniform: tuple[float, float] | None = None
    uniform: tuple[float, float] | None = None
    int_uniform: tuple[int, int] | None = None
    choice: tuple[Scalar, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = sorted(self.model_fields_set)
        if len(given) != 1:
            kinds = "log_uniform, uniform, int_uniform, choice"
            raise ValueError(f"give exactly one of {kinds}, got {', '.join(given) or 'none'}")
        if self.choice is not None:
            if not self.choice:
                raise ValueError("choice needs at least one value, got an empty list")
            if len(set(self.choice)) < len(self.choice):
                raise ValueError(f"choice lists a value twice: {', '.join(repr(value) for value in self.choice)}")
            return self
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"{given[0]} is [low, high] with low < high, got [{low}, {high}]")
        if self.log_uniform is not None and low <= 0:
            raise ValueError(f"log_uniform needs low > 0, got {low}")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value of a numeric space."""
        bounds = self.log_uniform or self.uniform or self.int_uniform
        assert bounds is not None
        return bounds

    @property
    def values(self) -> tuple[Scalar, ...] | range | None:
        """All values of a discrete space in order; None for a continuous one."""
        if self.choice is not None:
            return self.choice
        if self.int_uniform is not None:
            return range(self.int_uniform[0], self.int_uniform[1] + 1)
        return None

    def ends(self) -> tuple[Scalar, Scalar]:
        """The first and the last value: what a plan checks when the values between are not known yet."""
        values = self.values
        return (values[0], values[-1]) if values is not None else self.bounds

    def at(self, u: float) -> Scalar:
        """The value at the fraction ``u`` in [0, 1] of the way from first to last (log scale for ``log_uniform``).

        Continuous values are rounded to 6 significant digits: keys must not hang on the last bit of a power.
        """
        values = self.values
        if values is not None:
            return values[min(int(u * len(values)), len(values) - 1)]
        low, high = self.bounds
        if self.log_uniform is not None:
            value = math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
        else:
            value = low + u * (high - low)
        return min(max(float(f"{value:.6g}"), low), high)


def design(
    spaces: dict[str, SearchSpace], n: int, sampler: str, options: dict[str, Any] | None = None
) -> tuple[dict[str, Any], ...]:
    """``n`` distinct settings, the same on every machine and in whatever order the trials end.

    ``spread`` covers the space evenly: one parameter is a grid with both ends, on its own scale; several follow a
    Halton sequence (Halton 1960) with one seeded shift modulo 1 (Cranley & Patterson 1976). ``qmc`` is such a sequence
    for any number, Sobol's (1967) or Halton's. ``random`` draws independently. Of these, a discrete space with no more
    than ``n`` points is listed whole, so fewer than ``n`` may come back. ``grid`` is the product of all values of
    discrete spaces and of evenly spaced values of continuous ones, see :func:`check_grid`.
    """
    if sampler == "grid":
        n_points = check_grid(spaces, n, (options or {}).get("points", {}))
        axes = [space.values or _evenly(space, n_points[path]) for path, space in spaces.items()]
        return tuple(dict(zip(spaces, point, strict=True)) for point in itertools.product(*axes))
    counts = [len(space.values) for space in spaces.values() if space.values is not None]
    if len(counts) == len(spaces) and math.prod(counts) <= n:
        return tuple(
            dict(zip(spaces, point, strict=True))
            for point in itertools.product(*(space.values for space in spaces.values()))
        )
    if sampler == "spread" and len(spaces) == 1:
        (path, space) = next(iter(spaces.items()))
        return tuple({path: value} for value in _evenly(space, n))
    kind = {"spread": "halton", "qmc": (options or {}).get("kind", "sobol")}.get(sampler)
    points = _uniform(len(spaces)) if kind is None else _quasi_random(len(spaces), kind)
    found: dict[str, dict[str, Any]] = {}
    for point in itertools.islice(points, n * DRAWS_PER_TRIAL):
        settings = {path: space.at(float(u)) for (path, space), u in zip(spaces.items(), point, strict=True)}
        found.setdefault(repr(settings), settings)
        if len(found) == n:
            break
    return tuple(found.values())


def _evenly(space: SearchSpace, n: int) -> list[Scalar]:
    if n == 1:
        return [space.at(0.5)]
    values = space.values
    if values is None:
        return [space.at(i / (n - 1)) for i in range(n)]
    return [values[round(i * (len(values) - 1) / (n - 1))] for i in range(n)]


def check_grid(spaces: dict[str, SearchSpace], n: int, points: dict[str, int]) -> dict[str, int]:
    """Points of every setting of a grid of exactly ``n``. Continuous settings without a number share what is left.

    Raises ValueError when ``n`` is not such a product: a part of a grid would not be the same for all settings.
    """
    for path, count in points.items():
        if path not in spaces or spaces[path].values is not None:
            raise ValueError(f"search: options: points of {path}: not a continuous setting of [tune]")
        if count < 1:
            raise ValueError(f"search: options: points of {path} must be at least 1, got {count}")
    counts = {path: len(space.values) for path, space in spaces.items() if space.values is not None} | points
    left = [path for path in spaces if path not in counts]
    whole = math.prod(counts.values())
    share = round((n / whole) ** (1 / len(left))) if left else 1
    counts |= dict.fromkeys(left, max(share, 1))
    if math.prod(counts.values()) != n:
        told = " x ".join(f"{counts[path]} of {path}" for path in spaces)
        raise ValueError(
            f"search: a grid of {told} has {math.prod(counts.values())} points, not budget.tune_trials = {n}"
        )
    return {path: counts[path] for path in spaces}


def _quasi_random(n_dims: int, kind: str) -> Iterator[np.ndarray]:
    from scipy.stats import qmc  # takes a third of a second to import, and few commands need it

    # Our own shift instead of scipy's scrambling: keys must survive another version of scipy.
    shift = np.random.default_rng(DESIGN_SEED).random(n_dims)
    sequence = (qmc.Sobol if kind == "sobol" else qmc.Halton)(n_dims, scramble=False)
    while True:
        yield (sequence.random(1)[0] + shift) % 1.0


def _uniform(n_dims: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(DESIGN_SEED)
    while True:
        yield rng.random(n_dims)
