"""Fair arms: one cost held equal across arms by solving the free dimension of each. Pure, and done while planning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from experiments.config import ExperimentConfig, ModelConfig, merged
from experiments.errors import UserError, nearest
from experiments.pattern import MixerSpec, Pattern, parse_pattern
from sweeps.definition import TUNING_SEED, FreeDimension, MatchConfig

# A dimension is looked for up to here: larger ones mean that the cost does not grow with it.
MAX_VALUE = 2**20
# Values in a row that a configuration may refuse (a width must divide another, be even, ...) before no more are tried.
MAX_REFUSED = 256
# Doublings without a rise after which the cost counts as bounded, as a window's state is by the context.
MAX_FLAT = 4


@dataclass(frozen=True)
class Matched:
    """An arm-cell's ``quantity`` against the target. ``free`` was set to ``value``; "" and None for a fixed arm.

    ``reached`` is what counts (of the whole model, or of its mixers); ``model`` and ``mixers`` are both.
    """

    free: str
    value: int | None
    target: float
    reached: float
    model: float
    mixers: float

    @property
    def error(self) -> float:
        """Relative: 0.03 is 3 % above the target."""
        return self.reached / self.target - 1

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "error": self.error}


def matched_values(
    match: MatchConfig, frees: dict[str, FreeDimension | None], arms: dict[str, dict[str, Any]], place: str
) -> dict[str, tuple[dict[str, Any], Matched | None]]:
    """The values of all arms of one cell with every free dimension solved, and what each arm reached.

    ``frees`` holds the arms that are held to the target (None: with nothing to solve); other arms stay as they are.

    Raises :class:`UserError` where an arm can't come within the tolerance, with the nearest values that it reaches.
    """
    if isinstance(match.target, str):
        target = _counted(match, arms[match.target], f"{place}, arm {match.target}")[0]
        if target <= 0:
            raise UserError(f"{place}, arm {match.target}: match: its {match.quantity} are 0 and can't be a target")
    else:
        target = match.target
    found: dict[str, tuple[dict[str, Any], Matched | None]] = {}
    for arm, values in arms.items():
        if arm not in frees:
            found[arm] = (values, None)
        else:
            found[arm] = _solved(match, frees[arm], values, target, f"{place}, arm {arm}")
    return found


def _solved(
    match: MatchConfig, free: FreeDimension | None, values: dict[str, Any], target: float, place: str
) -> tuple[dict[str, Any], Matched]:
    if free is None:
        reached, model, mixers = _counted(match, values, place)
        matched = Matched("", None, target, reached, model, mixers)
        if abs(matched.error) > match.tolerance:
            way_out = 'free = "..." names the dimension to solve, free = false leaves the arm out'
            raise UserError(f"{place}: match: {_missed(match, target)}: it has {_reached(matched)}; {way_out}")
        return values, matched
    write = _writer(free, values, place)
    first_refusal: list[UserError] = []

    def cost_of(value: int) -> float | None:
        try:
            return _counted(match, write(value), place)[0]
        except UserError as error:
            first_refusal.append(error)
            return None

    around = nearest_values(cost_of, target, free.multiple_of, min(free.at_most or MAX_VALUE, MAX_VALUE))
    if not around:
        raise UserError(
            f"{place}: match: no value of {free.name} can be used; the first was refused: {first_refusal[0]}"
        )
    tried = []
    for value in around:
        reached, model, mixers = _counted(match, write(value), place)
        tried.append(Matched(free.name, value, target, reached, model, mixers))
    best = min(tried, key=lambda matched: abs(matched.error))
    if abs(best.error) > match.tolerance:
        nearby = ", ".join(f"{matched.free}={matched.value} gives {_reached(matched)}" for matched in tried)
        way_out = "free another dimension, or change target or tolerance"
        raise UserError(f"{place}: match: {_missed(match, target)}: {nearby}; {way_out}")
    return write(best.value), best


def nearest_values(cost_of: Callable[[int], float | None], target: float, step: int, limit: int) -> list[int]:
    """The multiples of ``step`` up to ``limit`` with the cost next below and next above ``target``, where there is one.

    ``cost_of`` is None for a value that can't be used, and grows with the others: doubling, then bisection.
    """

    def usable(values: range) -> tuple[int, float] | None:
        for value in values[:MAX_REFUSED]:
            cost = cost_of(value)
            if cost is not None:
                return value, cost
        return None

    low = usable(range(step, limit + 1, step))
    if low is None:
        return []
    if low[1] >= target:
        return [low[0]]
    high, end, n_flat = None, low[0], 0
    while n_flat < MAX_FLAT and (point := usable(range(2 * end, min(4 * end, limit + 1), step))) is not None:
        end = point[0]
        if point[1] >= target:
            high = point
            break
        n_flat = n_flat + 1 if point[1] <= low[1] else 0
        low = point if point[1] > low[1] else low
    if high is None:
        # The doubling may have jumped over the last usable values, below a limit or a rule's bound.
        top = usable(range(min(limit // step * step, 2 * end - step), end, -step)) if n_flat < MAX_FLAT else None
        if top is None or top[1] < target:
            return [top[0] if top is not None and top[1] > low[1] else low[0]]
        high = top
    while True:
        middle = (low[0] + high[0]) // (2 * step) * step
        point = usable(range(max(middle, low[0] + step), high[0], step))
        point = point or usable(range(min(middle, high[0] - step), low[0], -step))
        if point is None:
            return [low[0], high[0]]
        if point[1] >= target:
            high = point
        else:
            low = point


def _counted(match: MatchConfig, values: dict[str, Any], place: str) -> tuple[float, float, float]:
    """What counts, the whole model's and the mixers'."""
    from experiments.counted import counted_cost  # imports torch

    config = ExperimentConfig.parse(merged(values, {"seed": TUNING_SEED}), place)
    try:
        cost = counted_cost(config, match.quantity)
    except UserError as error:
        raise UserError(f"{place}: match: {error}") from None
    return (cost.total if match.of == "model" else cost.mixers), cost.total, cost.mixers


def _writer(free: FreeDimension, values: dict[str, Any], place: str) -> Callable[[int], dict[str, Any]]:
    """How a value of the free dimension enters an arm's values. It must not be given there already."""
    owner, _, option = free.name.rpartition(".")
    given = f"{place}: free: {free.name} is also given a value; give it in one place"
    if owner == "model":
        whole = sorted(name for name in ("d_model", "n_layers", "mlp_width") if name in ModelConfig.model_fields)
        if option not in whole:
            raise UserError(f"{place}: free: model has no whole-number setting {option!r}{nearest(option, whole)}")
        return lambda value: merged(values, {free.name: value})
    pattern = parse_pattern(values["model"]["pattern"])
    names = pattern.mixer_names()
    if owner and owner not in names:
        raise UserError(f"{place}: free: {free.name}: the pattern has no mixer {owner!r}{nearest(owner, names)}")
    from mixers import registry  # imports torch

    fields = {name: set(registry.get(name).Config.model_fields) - {"d_model"} for name in ([owner] if owner else names)}
    having = [name for name, known in fields.items() if option in known]
    if not having:
        known = sorted({field for names in fields.values() for field in names} | {"model.d_model", "model.mlp_width"})
        raise UserError(f"{place}: free: no mixer of the pattern has an option {option!r}{nearest(free.name, known)}")
    if len(having) > 1:
        ways = " or ".join(f"{name}.{option}" for name in having)
        raise UserError(f"{place}: free: several mixers have an option {option!r}: write {ways}")
    specs = [spec for spec in pattern.token if spec is not None] + [placed.mixer for placed in pattern.placements]
    if any(spec.name == having[0] and option in dict(spec.options) for spec in specs):
        raise UserError(given)

    def write(value: int) -> dict[str, Any]:
        return merged(values, {"model.pattern": str(_with_option(pattern, having[0], option, value))})

    return write


def _with_option(pattern: Pattern, name: str, option: str, value: int) -> Pattern:
    def written(spec: MixerSpec | None) -> MixerSpec | None:
        if spec is None or spec.name != name:
            return spec
        return MixerSpec(name, tuple(sorted({**dict(spec.options), option: value}.items())))

    return Pattern(
        tuple(written(spec) for spec in pattern.token),
        tuple(replace(placed, mixer=written(placed.mixer)) for placed in pattern.placements),
    )


def _missed(match: MatchConfig, target: float) -> str:
    words = f"{match.quantity} of the {match.of}"
    return f"{words} can't come within {match.tolerance:.3g} of {target:,.0f}"


def _reached(matched: Matched) -> str:
    return f"{matched.reached:,.0f} ({100 * matched.error:+.1f} %)"
