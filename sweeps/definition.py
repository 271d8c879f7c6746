"""The sweep file: what is compared, over which factors, with which budget. Strict: one bad key is one clear line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from experiments.config import flatten, merged, read_toml
from experiments.errors import UserError, nearest
from experiments.recipe import RECIPES, recipe_path
from mixers.config import StrictModel
from sweeps.search import SearchConfig
from sweeps.space import SearchSpace

DEFINITIONS = Path(__file__).parent / "definitions"
# All tuning runs share this seed, which no replicate may use: settings are chosen on other data orders and weights
# than those that are reported, and trials of one search differ in nothing but their settings.
TUNING_SEED = 1_000_003

# Settings that belong to one section of the sweep file alone.
_OWNERS = {
    "seed": "the list `seeds` sets it",
    "train.max_tokens": "[budget] sets it, the same for every arm",
    "train.max_steps": "[budget] sets it, the same for every arm",
}
# Tuning these would choose the problem instead of the way to train on it.
_NOT_TUNABLE = ("task", "seeds", "state", "model.pattern")
_TAKEN_NAMES = ("artifacts",)  # a folder of the tracking store beside the sweeps' own


class MetricConfig(StrictModel):
    """The metric that chooses settings, and the one for the table. They read different splits."""

    select: str
    report: str
    direction: Literal["maximize", "minimize"]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.select == self.report:
            raise ValueError(
                f"select and report are both {self.select!r}: what is chosen on the reported split flatters itself; "
                "choose on 'select/...'"
            )
        for split in ("select", "report"):
            name = getattr(self, split)
            if not re.fullmatch(rf"{split}/\S+", name):
                raise ValueError(f"{split} must name a metric of its own split, '{split}/...', got {name!r}")
        return self


class BudgetConfig(StrictModel):
    """What every run may spend, the same for every arm."""

    max_tokens: int | None = Field(None, gt=0)
    max_steps: int | None = Field(None, gt=0)
    tune_trials: int = Field(0, ge=0, description="settings tried per arm and cell")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.max_tokens is None) == (self.max_steps is None):
            raise ValueError("give exactly one of max_tokens and max_steps")
        return self


class FreeDimension(StrictModel):
    """The whole number of an arm that [match] solves: an option of one of its mixers, or a setting of the model.

    name: ``n_subkeys``, ``fwpkm.n_subkeys`` where several mixers have such an option, or ``model.d_model``.
    """

    name: str
    multiple_of: int = Field(1, gt=0)
    at_most: int | None = Field(None, gt=0)


class MatchConfig(StrictModel):
    """What is held equal across arms in every cell. ``target`` is a number or the name of an arm.

    of: count the whole model, as recorded under ``cost/``, or its mixers alone.
    """

    quantity: Literal["parameters", "state_bytes", "flops_per_token"]
    target: float | str
    tolerance: float = Field(0.05, gt=0, lt=1, description="largest relative distance from the target")
    of: Literal["model", "mixers"] = "model"

    @field_validator("target")
    @classmethod
    def _target(cls, target: float | str) -> float | str:
        if not isinstance(target, str) and target <= 0:
            raise ValueError(f"must be above 0, got {target:g}")
        return target


class SweepConfig(StrictModel):
    """One question. ``arms`` x ``vary`` are the arm-cells; each is tuned over ``tune`` and then run with every seed.

    base: overrides of the experiment that all runs share; after :func:`load_sweep` it holds the experiment as well.
    arms: name -> overrides; ``mixer`` is short for ``model.pattern``, ``free`` names the dimension that [match] solves.
    vary: dotted path -> values, crossed. tune: dotted path -> search space.
    threads: CPU threads of torch in every run. Sums of several threads may be rounded otherwise than those of one, so
        it belongs to the question, and never follows from how many runs share the machine.
    """

    name: str
    question: str = Field(min_length=1)
    experiment: str | None = None
    base: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[int, ...]
    metric: MetricConfig
    budget: BudgetConfig
    arms: dict[str, dict[str, Any]]
    vary: dict[str, Any] = Field(default_factory=dict)
    tune: dict[str, SearchSpace] = Field(default_factory=dict)
    search: SearchConfig = SearchConfig()
    match: MatchConfig | None = None
    threads: int = Field(1, gt=0)

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(
                f"names a folder: letters, digits, '.', '_' and '-', starting with one of the former two, got {name!r}"
            )
        if name in _TAKEN_NAMES:
            raise ValueError(f"{name!r} is a folder of the tracking store; choose another name")
        return name

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds:
            raise ValueError("at least one seed is needed, got an empty list")
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            raise ValueError(f"{twice[0]} is listed twice; a repeated seed is not a replicate")
        if min(seeds) < 0:
            raise ValueError(f"seeds are not negative, got {min(seeds)}")
        if TUNING_SEED in seeds:
            raise ValueError(f"{TUNING_SEED} is the seed of the tuning runs; choose another")
        return seeds

    @field_validator("arms")
    @classmethod
    def _arms(cls, arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if not arms:
            raise ValueError('nothing to compare: add [arms.NAME] with mixer = "..."')
        for name, overrides in arms.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _+=@()-]{0,79}", name):
                raise ValueError(f"arm names are letters, digits, spaces and _+=@()-, got {name!r}")
            if "mixer" in overrides and "model.pattern" in flatten(overrides):
                raise ValueError(f"{name}: `mixer` is short for model.pattern; give one of them")
            if "mixer" in overrides and not isinstance(overrides["mixer"], str):
                raise ValueError(f"{name}: mixer is a pattern in quotes, got {overrides['mixer']!r}")
        return arms

    @field_validator("vary")
    @classmethod
    def _vary(cls, vary: dict[str, Any]) -> dict[str, Any]:
        for path, values in vary.items():
            if not isinstance(values, tuple):
                raise ValueError(f"{path} takes a list of values, got {values!r}")
            if not values:
                raise ValueError(f"{path} is an empty list: no cell would be left")
            texts = [repr(value) for value in values]
            if twice := [text for text in texts if texts.count(text) > 1]:
                raise ValueError(f"{path} lists {twice[0]} twice")
        return vary

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_match()
        if self.tune and not self.budget.tune_trials:
            raise ValueError("budget.tune_trials must be at least 1 where there is a [tune], got 0")
        if self.budget.tune_trials and not self.tune:
            raise ValueError(f"budget.tune_trials = {self.budget.tune_trials}, but there is no [tune] to search")
        self.search.check(self.tune, self.budget.tune_trials, self.metric.select)
        touched = {
            "base": set(flatten(self.base)),
            **{f"arms.{arm}": set(flatten(arm_overrides(values))) for arm, values in self.arms.items()},
            "vary": {leaf for path, values in self.vary.items() for value in values for leaf in flatten({path: value})},
            "tune": set(self.tune),
        }
        for section, paths in touched.items():
            for path in sorted(paths):
                if owner := next((text for owned, text in _OWNERS.items() if _overlap(path, owned)), None):
                    raise ValueError(f"{section}: {path} can't be set here: {owner}")
        for path in self.tune:
            if any(_overlap(path, section) for section in _NOT_TUNABLE):
                raise ValueError(
                    f"tune: {path} is part of the question; tune settings of training or model, or vary it"
                )
        for varied in sorted(touched["vary"]):
            for section, paths in touched.items():
                if section not in ("base", "vary") and (other := _first_overlap(varied, paths)):
                    raise ValueError(f"vary: {varied} would overrule {other} of [{section}]; give it in one place")
        for tuned in self.tune:
            for section, paths in touched.items():
                if section.startswith("arms.") and (other := _first_overlap(tuned, paths)):
                    raise ValueError(f"tune: {tuned} would overrule {other} of [{section}]; give it in one place")
        return self

    @property
    def free_dimensions(self) -> dict[str, FreeDimension | None]:
        """Of all arms that [match] holds to its target; None: nothing to solve, the arm must meet it as it is."""
        frees: dict[str, FreeDimension | None] = {}
        for arm, values in self.arms.items() if self.match is not None else ():
            free = values.get("free")
            if free is None:
                frees[arm] = None
            elif free is not False:
                table = {"name": free} if isinstance(free, str) else free
                if not isinstance(table, dict):
                    way_out = 'free = "n_subkeys", free = { name = "key_dim", multiple_of = 8 } or free = false'
                    raise UserError(f"sweep {self.name}: arms.{arm}: write {way_out}, got {free!r}")
                frees[arm] = FreeDimension.parse(table, f"sweep {self.name}: arms.{arm}.free")
        return frees

    def _check_match(self) -> None:
        having = [arm for arm, values in self.arms.items() if "free" in values]
        if self.match is None:
            if having:
                raise ValueError(f"arms.{having[0]}: free is for [match], and there is none")
            return
        target = self.match.target
        if isinstance(target, str) and target not in self.arms:
            raise ValueError(f"match: target: there is no arm {target!r}{nearest(target, list(self.arms))}")
        if target in having:
            raise ValueError(f"match: target: arm {target!r} can't have a free dimension: the others are held to it")
        if tuned := next((path for path in self.tune if path.startswith("model.")), None):
            raise ValueError(f"tune: {tuned} would change the model, whose {self.match.quantity} [match] holds equal")
        for arm, free in self.free_dimensions.items():
            if free is None:
                continue
            for section, values in (("arms." + arm, arm_overrides(self.arms[arm])), ("vary", self.vary)):
                if other := _first_overlap(free.name, set(flatten(values))):
                    raise ValueError(f"arms.{arm}: free: {free.name} is also given in [{section}] as {other}")


def arm_overrides(values: dict[str, Any]) -> dict[str, Any]:
    """An arm's overrides of the experiment, with ``mixer`` written out as ``model.pattern``."""
    rest = {key: value for key, value in values.items() if key not in ("mixer", "free")}
    return merged(rest, {"model.pattern": values["mixer"]}) if "mixer" in values else merged({}, rest)


def load_sweep(name_or_path: str | Path, overrides: dict[str, Any] | None = None) -> SweepConfig:
    """The sweep in a file, or the shipped one of that name, with dotted ``overrides`` of its keys laid over it.

    Raises :class:`UserError` naming file, key, rule and value.
    """
    path = find_definition(name_or_path)
    config = SweepConfig.parse(_overridden(read_toml(path), overrides or {}, str(path)), str(path))
    if config.experiment is None:
        return config
    experiment = _find_experiment(config.experiment, path)
    base = merged(read_toml(experiment), config.base)
    return config.model_copy(update={"experiment": str(experiment), "base": base})


def definition_names() -> list[str]:
    """Names of the shipped sweeps."""
    return sorted(path.stem for path in DEFINITIONS.glob("*.toml"))


def find_definition(name_or_path: str | Path) -> Path:
    """The file of a sweep given by path or by shipped name."""
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file() or len(path.parts) > 1:
        return path
    shipped = DEFINITIONS / f"{path}.toml"
    if not shipped.is_file():
        raise UserError(f"{path}: neither a sweep file nor a shipped sweep{nearest(str(path), definition_names())}")
    return shipped


def _find_experiment(text: str, sweep_file: Path) -> Path:
    """Beside the sweep file, from the top of the project, or the name of a shipped recipe."""
    for folder in (sweep_file.parent, RECIPES.parent.parent, RECIPES):
        if (folder / text).is_file():
            return folder / text
    try:
        return recipe_path(text)
    except UserError as error:
        raise UserError(f"{sweep_file}: experiment: {error}") from None


def _overridden(values: dict[str, Any], overrides: dict[str, Any], place: str) -> dict[str, Any]:
    """The file's values with overrides; [vary] and [tune] come back keyed by dotted path, however they were written."""
    arms = values.get("arms")
    if isinstance(arms, dict) and (dotted := [name for name in arms if "." in name]):
        raise UserError(f"{place}: arms: names can't contain a dot, got {dotted[0]!r}")
    given = merged({}, overrides)
    result = merged(values, given)
    for section, by_path in (("vary", flatten), ("tune", _spaces)):
        parts = [source.get(section, {}) for source in (merged({}, values), given)]
        if all(isinstance(part, dict) for part in parts) and any(parts):
            # One path at a time: an override replaces a path's whole list or space, it never mixes with it.
            result[section] = {**by_path(parts[0]), **by_path(parts[1])}
    limits = ("max_tokens", "max_steps")
    chosen = given.get("budget")
    if isinstance(chosen, dict) and isinstance(result["budget"], dict) and any(limit in chosen for limit in limits):
        # One limit given on the command line stands for the file's, whichever of the two that was.
        for limit in limits:
            if limit not in chosen:
                result["budget"].pop(limit, None)
    return result


def _spaces(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables to dotted paths, down to the innermost tables: those are the search spaces."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
            found.update(_spaces(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _overlap(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.")


def _first_overlap(path: str, others: set[str]) -> str | None:
    return next((other for other in sorted(others) if _overlap(path, other)), None)
