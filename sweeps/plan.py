"""From a sweep file to its runs: a pure function, so that a bad setting is found before anything is created."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import dataclass
from typing import Any

from experiments.config import ExperimentConfig, flatten, merged
from experiments.errors import UserError
from experiments.pattern import parse_pattern
from experiments.records import RunIdentity
from sweeps.definition import TUNING_SEED, SweepConfig, arm_overrides
from sweeps.match import Matched, matched_values
from sweeps.search import refuse_unevaluated
from sweeps.space import design

ALL = "all"  # label of the only cell of a sweep without [vary]


@dataclass(frozen=True)
class PlannedRun:
    """One training to be done. ``trial`` numbers the tuning trials of an arm-cell; None for a replicate.

    ``settings`` are the tuned settings that it uses, by dotted path.
    """

    identity: RunIdentity
    config: ExperimentConfig
    settings: dict[str, Any]
    trial: int | None

    @property
    def key(self) -> str:
        return self.identity.key


@dataclass(frozen=True)
class ArmCell:
    """One arm in one cell: ``n_trials`` tuning runs choose the settings with which every seed is then run.

    ``values`` are the experiment's values but for tuned settings and seed. ``trial_settings`` is the fixed design,
    empty where an adaptive sampler proposes the settings. ``matched`` is what [match] made of it.
    """

    sweep: SweepConfig
    arm: str
    cell: str
    factors: dict[str, Any]
    values: dict[str, Any]
    trial_settings: tuple[dict[str, Any], ...]
    n_trials: int
    matched: Matched | None = None

    @property
    def name(self) -> str:
        return f"{self.arm} | {self.cell}"

    @property
    def pattern(self) -> str:
        """The pattern, in its canonical spelling."""
        return self.values["model"]["pattern"]

    @property
    def place(self) -> str:
        """How an error names it."""
        return f"sweep {self.sweep.name}, arm {self.arm}, cell {self.cell}"

    @property
    def n_runs(self) -> int:
        return self.n_trials + len(self.sweep.seeds)

    @functools.cached_property
    def code(self) -> dict[str, str]:
        """The code that decides its runs' results, beyond what the release stands for.

        The same for all of them: neither pattern nor task can be tuned.
        """
        settings = self.trial_settings[0] if self.trial_settings else _corners(self.sweep)[0]
        return self._config(settings, TUNING_SEED).code()

    def trial(self, number: int, settings: dict[str, Any]) -> PlannedRun:
        """Tuning run ``number`` with these settings. All share one seed, which no replicate uses."""
        return self._run(settings, TUNING_SEED, number)

    def replicates(self, settings: dict[str, Any]) -> tuple[PlannedRun, ...]:
        """One run per seed with the chosen settings; arms share the seeds and with them the data."""
        return tuple(self._run(settings, seed, None) for seed in self.sweep.seeds)

    def _run(self, settings: dict[str, Any], seed: int, trial: int | None) -> PlannedRun:
        config = self._config(settings, seed)
        identity = RunIdentity(
            key=config.key(self.code),
            sweep=self.sweep.name,
            arm=self.arm,
            cell=self.cell,
            factors=self.factors,
            role="replicate" if trial is None else "tuning",
            seed=seed,
            pattern=self.pattern,
        )
        return PlannedRun(identity, config, settings, trial)

    def _config(self, settings: dict[str, Any], seed: int) -> ExperimentConfig:
        return ExperimentConfig.parse(merged(merged(self.values, settings), {"seed": seed}), self.place)


@dataclass(frozen=True)
class Plan:
    """All arm-cells of a sweep, arm by arm within a cell."""

    sweep: SweepConfig
    arm_cells: tuple[ArmCell, ...]

    @property
    def n_runs(self) -> int:
        return sum(arm_cell.n_runs for arm_cell in self.arm_cells)

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """Label -> varied settings."""
        return {arm_cell.cell: arm_cell.factors for arm_cell in self.arm_cells}

    @property
    def patterns(self) -> dict[str, str]:
        """Arm -> pattern. Where the pattern itself is varied, the one of the first cell."""
        return {arm_cell.arm: arm_cell.pattern for arm_cell in self.arm_cells[: len(self.sweep.arms)]}

    def match_json(self) -> dict[str, Any]:
        """The [match] table, with what every arm-cell reached; empty without one."""
        if self.sweep.match is None:
            return {}
        held = {arm_cell.name: arm_cell.matched.to_json() for arm_cell in self.arm_cells if arm_cell.matched}
        return {**self.sweep.match.model_dump(), "reached": held}

    @property
    def devices(self) -> set[str]:
        """What ``train.device`` says in its runs."""
        return {arm_cell.values["train"].get("device", "auto") for arm_cell in self.arm_cells}

    @property
    def code(self) -> dict[str, str]:
        """Of all arm-cells: file or mixer -> hash."""
        return {name: code for arm_cell in self.arm_cells for name, code in arm_cell.code.items()}

    def count(self) -> str:
        """``2 arms x 3 cells x (12 tuning + 5 seeds) = 102 runs``."""
        n_trials = self.arm_cells[0].n_trials
        seeds = _counted(len(self.sweep.seeds), "seed")
        inner = f"({n_trials} tuning + {seeds})" if n_trials else seeds
        arms, cells = _counted(len(self.sweep.arms), "arm"), _counted(len(self.cells), "cell")
        return f"{arms} x {cells} x {inner} = {_counted(self.n_runs, 'run')}"


def plan(sweep: SweepConfig) -> Plan:
    """The sweep's arm-cells, every config of which has been checked.

    Raises :class:`UserError` for a setting that the experiment refuses, a pattern that can't be built, an arm that
    can't meet [match], and for two arm-cells that resolve to the same run.
    """
    search, n_trials = sweep.search, sweep.budget.tune_trials
    settings: tuple[dict[str, Any], ...] = ()
    if sweep.tune and not search.adaptive:
        settings = design(sweep.tune, n_trials, search.sampler, search.options)
        n_trials = len(settings)
    frees = sweep.free_dimensions
    arm_cells: list[ArmCell] = []
    for label, factors in cells_of(sweep).items():
        arms = {arm: _values(sweep, arm, factors) for arm in sweep.arms}
        if sweep.match is None:
            found = {arm: (values, None) for arm, values in arms.items()}
        else:
            found = matched_values(sweep.match, frees, arms, f"sweep {sweep.name}, cell {label}")
        arm_cells += [
            ArmCell(sweep, arm, label, factors, values, settings, n_trials, matched)
            for arm, (values, matched) in found.items()
        ]
    first_with_key: dict[str, ArmCell] = {}
    models: dict[Any, tuple[ExperimentConfig, str]] = {}
    for arm_cell in arm_cells:
        for tried in settings or _corners(sweep):
            run = arm_cell.trial(0, tried)
            refuse_unevaluated(search, run.config.train.eval_every, arm_cell.place)
            _refuse_twin(first_with_key.setdefault(run.key, arm_cell), arm_cell)
            models.setdefault((run.config.model, run.config.task, run.config.state), (run.config, arm_cell.place))
    for config, place in models.values():
        _validate(config, place)
    return Plan(sweep, tuple(arm_cells))


def cells_of(sweep: SweepConfig) -> dict[str, dict[str, Any]]:
    """Label -> factors, for the cross of the varied settings."""
    cells: dict[str, dict[str, Any]] = {}
    for point in itertools.product(*sweep.vary.values()):
        factors = dict(zip(sweep.vary, point, strict=True))
        label = cell_label(factors)
        if label in cells:
            raise UserError(f"sweep {sweep.name}: vary: two cells are both called {label!r}; write their values apart")
        cells[label] = factors
    return cells


def cell_label(factors: dict[str, Any]) -> str:
    """``n_pairs=8, d_model=64``: the last part of each path, or the whole path where that would be ambiguous."""
    lasts = [path.rpartition(".")[2] for path in factors]
    shown = (
        f"{path if lasts.count(last) > 1 else last}={_value_label(value)}"
        for (path, value), last in zip(factors.items(), lasts, strict=True)
    )
    return ", ".join(shown) or ALL


def _value_label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _values(sweep: SweepConfig, arm: str, factors: dict[str, Any]) -> dict[str, Any]:
    """Experiment, then arm, then cell; the budget replaces whatever limit the experiment has.

    The pattern gets its canonical spelling, so that a space more or less does not make another run.
    """
    values = merged(merged(sweep.base, arm_overrides(sweep.arms[arm])), factors)
    train = {key: value for key, value in values.get("train", {}).items() if key not in ("max_tokens", "max_steps")}
    limit = (
        {"max_tokens": sweep.budget.max_tokens} if sweep.budget.max_tokens else {"max_steps": sweep.budget.max_steps}
    )
    pattern = flatten(values).get("model.pattern")
    if not isinstance(pattern, str):
        raise UserError(f'sweep {sweep.name}, arm {arm}: no mixer: give mixer = "...", or model.pattern for all arms')
    try:
        canonical = str(parse_pattern(pattern))
    except UserError as error:
        raise UserError(f"sweep {sweep.name}, arm {arm}: {error}") from None
    return merged({**values, "train": {**train, **limit}}, {"model.pattern": canonical})


def _corners(sweep: SweepConfig) -> tuple[dict[str, Any], ...]:
    """Settings at both ends of every space: they stand for those that an adaptive sampler will propose."""
    ends = [space.ends() for space in sweep.tune.values()]
    return tuple(dict(zip(sweep.tune, corner, strict=True)) for corner in zip(*ends, strict=True)) or ({},)


def _refuse_twin(first: ArmCell, second: ArmCell) -> None:
    if first is second:
        return
    place = f"sweep {second.sweep.name}"
    if first.cell == second.cell:
        raise UserError(
            f"{place}: arms {first.arm!r} and {second.arm!r} are the same run in cell {first.cell}: "
            "give them different settings, or drop one"
        )
    raise UserError(
        f"{place}: {first.name!r} and {second.name!r} are the same run: what is varied changes nothing there"
    )


def _validate(config: ExperimentConfig, place: str) -> None:
    """Refuse a model that can't be built."""
    from experiments.backbone import validate_model  # imports torch, which a plan without errors needs only here

    try:
        validate_model(config)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _counted(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
