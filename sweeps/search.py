"""The searches by name, their options, and Optuna's objects for them. Optuna is imported only where it is needed."""

from __future__ import annotations

import importlib.util
import warnings
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from mixers.config import StrictModel
from mixers.errors import UserError
from sweeps.objectives import check_objectives
from sweeps.space import DESIGNS, SearchSpace, check_grid

if TYPE_CHECKING:
    import optuna

Sampler = Literal["spread", "random", "qmc", "grid", "tpe", "gp", "cmaes", "nsgaii"]
Pruner = Literal["none", "median", "hyperband"]
# NSGA-II breeds from its second generation on: by default a search has so many generations.
N_GENERATIONS = 4


class NoOptions(StrictModel):
    """Of a search that has nothing to set."""


class QMCOptions(StrictModel):
    kind: Literal["sobol", "halton"] = "sobol"


class GridOptions(StrictModel):
    """points: path -> number of points of a continuous setting; those not named share what the budget leaves."""

    points: dict[str, int] = Field(default_factory=dict)


class TPEOptions(StrictModel):
    n_startup_trials: int = Field(10, ge=0, description="random trials before the first proposal")
    n_ei_candidates: int = Field(24, gt=0)
    multivariate: bool = False
    constant_liar: bool = Field(True, description="count running trials as bad ones, so that none is proposed twice")


class GPOptions(StrictModel):
    n_startup_trials: int = Field(10, ge=0, description="random trials before the first proposal")
    deterministic_objective: bool = False


class CMAESOptions(StrictModel):
    n_startup_trials: int = Field(1, ge=0, description="random trials before the first proposal")
    sigma0: float | None = Field(None, gt=0)
    popsize: int | None = Field(None, gt=1)


class NSGAIIOptions(StrictModel):
    """population_size: trials of a generation; None: a quarter of the budget, at least 2."""

    population_size: int | None = Field(None, ge=2)
    mutation_prob: float | None = Field(None, ge=0, le=1)
    crossover_prob: float = Field(0.9, ge=0, le=1)
    swapping_prob: float = Field(0.5, ge=0, le=1)


class MedianOptions(StrictModel):
    n_startup_trials: int = Field(5, ge=0, description="trials that must have ended before one is pruned")
    n_warmup_steps: int = Field(0, ge=0, description="steps of a training before it can be pruned")


class HyperbandOptions(StrictModel):
    """Resources are steps of training. min_resource None: the distance of two evaluations."""

    min_resource: int | None = Field(None, gt=0)
    reduction_factor: int = Field(3, ge=2)


_SAMPLER_OPTIONS: dict[str, type[StrictModel]] = {
    "spread": NoOptions,
    "random": NoOptions,
    "qmc": QMCOptions,
    "grid": GridOptions,
    "tpe": TPEOptions,
    "gp": GPOptions,
    "cmaes": CMAESOptions,
    "nsgaii": NSGAIIOptions,
}
_PRUNER_OPTIONS: dict[str, type[StrictModel]] = {
    "none": NoOptions,
    "median": MedianOptions,
    "hyperband": HyperbandOptions,
}


class SearchConfig(StrictModel):
    """How tuning settings are found, with the same number of trials in every arm and cell.

    spread, random, qmc and grid are fixed before anything runs; tpe, gp, cmaes and nsgaii ask Optuna, trial by trial.
    ``pruner`` ends trainings early that do worse than others at the same step of the same search. ``objectives`` are
    the select metric and costs, searched for their Pareto front; what breaks one of ``constraints`` is never chosen.
    """

    sampler: Sampler = "spread"
    options: dict[str, Any] = Field(default_factory=dict)
    pruner: Pruner = "none"
    pruner_options: dict[str, Any] = Field(default_factory=dict)
    objectives: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.sampler_options, self.parsed_pruner_options
        return self

    @property
    def adaptive(self) -> bool:
        return self.sampler not in DESIGNS

    @property
    def sampler_options(self) -> Any:
        return _SAMPLER_OPTIONS[self.sampler].parse(self.options, f"search: options of {self.sampler}")

    @property
    def parsed_pruner_options(self) -> Any:
        return _PRUNER_OPTIONS[self.pruner].parse(self.pruner_options, f"search: options of {self.pruner}")

    def check(self, spaces: dict[str, SearchSpace], n_trials: int, select: str) -> None:
        """Refuse a search that these spaces or this budget don't allow; ValueError says why."""
        if not spaces:
            if self != SearchConfig():
                raise ValueError("search: there is no [tune] to search")
            return
        check_objectives(self.objectives, self.constraints, select, self)
        options = self.sampler_options
        if self.sampler == "grid":
            check_grid(spaces, n_trials, options.points)
        if self.sampler == "cmaes":
            if categorical := next((path for path, space in spaces.items() if space.choice is not None), None):
                raise ValueError(f"search: cmaes can't search {categorical}, a choice; use tpe, gp or nsgaii")
            if len(spaces) < 2:
                raise ValueError("search: cmaes needs at least two settings in [tune]; use tpe or gp")
            if importlib.util.find_spec("cmaes") is None:
                raise ValueError("search: cmaes needs a package that is not installed: pip install cmaes")
        if self.sampler == "nsgaii" and (options.population_size or 0) >= n_trials:
            raise ValueError(
                f"search: population_size = {options.population_size} must be below budget.tune_trials = {n_trials}: "
                "the first generation is random"
            )


def optuna_sampler(search: SearchConfig, n_trials: int, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of a search. Fixed designs are queued, so theirs only fills in nothing."""
    import optuna

    options = search.sampler_options.model_dump(exclude_none=True)
    samplers = optuna.samplers
    with warnings.catch_warnings():
        # Optuna calls some of what it has had for years experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler == "tpe":
            return samplers.TPESampler(seed=seed, **options)
        if search.sampler == "gp":
            return samplers.GPSampler(seed=seed, **options)
        if search.sampler == "cmaes":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False, **options)
        if search.sampler == "nsgaii":
            options.setdefault("population_size", max(2, n_trials // N_GENERATIONS))
            return samplers.NSGAIISampler(seed=seed, **options)
    return samplers.RandomSampler(seed=seed)


def optuna_pruner(search: SearchConfig, eval_every: int, n_steps: int | None) -> optuna.pruners.BasePruner:
    """Optuna's pruner. ``n_steps`` of a training is None where it follows from tokens."""
    import optuna

    options = search.parsed_pruner_options
    if search.pruner == "median":
        return optuna.pruners.MedianPruner(options.n_startup_trials, options.n_warmup_steps)
    if search.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            options.min_resource or max(1, eval_every), n_steps or "auto", options.reduction_factor
        )
    return optuna.pruners.NopPruner()


def refuse_unevaluated(search: SearchConfig, eval_every: int, place: str) -> None:
    """A pruner compares evaluations within trainings: there must be some."""
    if search.pruner != "none" and eval_every == 0:
        raise UserError(f"{place}: search.pruner = {search.pruner!r} needs train.eval_every > 0: nothing to compare")
