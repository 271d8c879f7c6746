"""Words beside the numbers: what the front means, what the comparison holds equal, and where a mixer must fail."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from analysis.axes import axis, human
from analysis.comparison import Comparison
from analysis.patterns import mixer_names, windowed
from analysis.runs import RunRow, replicates
from sweeps.saved import SavedSweep

_FIXED_STATE = {"linear_attention", "gated_deltanet", "fwpkm"}

STATIC_MEMORY = (
    "a static product-key memory looks every token up by itself. It carries no state and mixes nothing over time, so "
    "it cannot recall what stood earlier in the sequence: expect chance level on in-context recall. What it stores "
    "lies in its parameters."
)
STATIC_MEMORY_HELPED = (
    "the static product-key memory in it mixes nothing over time and has no state: whatever is recalled from the "
    "context is the work of the other layers."
)
FIXED_STATE = (
    "its state has the same size however long the context is. Recall must fall once there are more pairs than the "
    "state can hold, and it depends strongly on the learning rate."
)
CHUNKED_MEMORY = (
    "a fast-weight memory reads what it held before the current chunk: a pair and its query inside one chunk cannot "
    "meet there."
)
GROWING_STATE = (
    "full attention keeps every token, so its state grows with the context. Its state bytes hold only for the context "
    "length they were measured at."
)
WINDOW = "attention with a window forgets what is further back than the window: pairs outside it are out of its reach."
SHARED_STATE = (
    "all sequences of a batch write into one state. Results depend on what else is in the batch, and one sequence's "
    "content can reach another."
)
PARETO = (
    "An arm is on the Pareto front (●) of a cell when no other arm there is at least as good on both axes and better "
    "on one. The front compares means over seeds: where intervals overlap, its order is not settled."
)
INTERVALS = (
    "Intervals are 95 % Student-t over seeds (independent weights, data and order). One seed has no interval. Runs "
    "that diverged or failed are counted beside the mean, not in it, so a mean over few survivors flatters an arm."
)


@dataclass(frozen=True)
class Note:
    title: str
    text: str


def pattern_notes(pattern: str, *, shared: bool = False) -> list[str]:
    """What the mixers of a pattern can't do by their nature. ``shared``: the state protocol shares one state."""
    names = mixer_names(pattern)
    compact = re.sub(r"\s", "", pattern)
    notes = []
    if names == ["pkm"]:
        notes.append(STATIC_MEMORY)
    elif "pkm" in names:
        notes.append(STATIC_MEMORY_HELPED)
    if names and set(names) <= _FIXED_STATE | {"pkm"} and set(names) & _FIXED_STATE:
        notes.append(FIXED_STATE)
    if "fwpkm" in names:
        notes.append(CHUNKED_MEMORY)
    if "softmax" in names:
        # a hybrid may have both kinds of attention layer
        n_windows = windowed(pattern)
        notes.extend([WINDOW] if n_windows else [])
        notes.extend([GROWING_STATE] if n_windows < len(re.findall(r"\bsoftmax\b", compact)) else [])
    if shared or re.search(r"""scope=["']?shared""", compact):
        notes.append(SHARED_STATE)
    return notes


def notes_for(saved: SavedSweep, rows: Iterable[RunRow], comparisons: Iterable[Comparison]) -> list[Note]:
    """How to read the page, what is held equal, then what arms can't do by their nature."""
    rows = list(rows)
    reading = [Note("Pareto front", PARETO), Note("Intervals", INTERVALS)]
    return [*reading, held_equal(saved, replicates(rows), list(comparisons)), *arm_notes(saved, rows)]


def arm_notes(saved: SavedSweep, rows: Iterable[RunRow]) -> list[Note]:
    """One note per fact, titled with the arms that it holds for."""
    sharing = {row.arm for row in rows if row.settings.get("state.scope") == "shared"}
    arms_of: dict[str, list[str]] = {}
    for arm, pattern in saved.arms.items():
        for text in pattern_notes(pattern, shared=arm in sharing):
            arms_of.setdefault(text, []).append(arm)
    return [Note(", ".join(arms), text[0].upper() + text[1:]) for text, arms in arms_of.items()]


def held_equal(saved: SavedSweep, runs: list[RunRow], comparisons: list[Comparison]) -> Note:
    """What the arms share by plan, and how far apart their sizes are, measured."""
    n_seeds = len(saved.seeds)
    same = [
        f"the same {n_seeds} seeds, so the same data and order" if n_seeds > 1 else "the same seed, so the same data"
    ]
    same += [
        f"{saved.budget[name]:,} {words} at most"
        for name, words in (
            ("max_tokens", "training tokens"),
            ("max_steps", "training steps"),
            ("tune_trials", "tuning trials per arm and cell"),
        )
        if saved.budget.get(name)
    ]
    sizes = [_spread(name, saved, comparisons) for name in ("cost/params", "cost/state_bytes", "cost/flops_per_token")]
    by_config = _same_settings(runs)
    text = f"By plan: {'; '.join(same)}{by_config}. Measured: {'; '.join(sizes)}."
    return Note(
        "What is held equal", text + " A comparison at equal size answers another question than one at equal cost."
    )


def _spread(name: str, saved: SavedSweep, comparisons: list[Comparison]) -> str:
    """``parameters equal`` or how far apart, as the widest spread between arms of a cell."""
    of = axis(name, saved.metric)
    widest, at = 1.0, (0.0, 0.0)
    measured = False
    for cell in saved.cells:
        values = [value for line in comparisons if line.cell == cell and (value := line.value(name)) is not None]
        measured |= len(values) > 1
        low, high = min(values, default=0.0), max(values, default=0.0)
        ratio = 1.0 if high == low else (high / low if low > 0 else float("inf"))
        if ratio > widest:
            widest, at = ratio, (low, high)
    what = of.label[0].lower() + of.label[1:] if not of.label.startswith("FLOPs") else of.label
    if not measured:
        return f"{what} unknown"
    if widest <= 1.02:
        return f"{what} equal within 2 %"
    return f"{what} NOT equal ({human(at[0], of.unit)} to {human(at[1], of.unit)} within a cell)"


def _same_settings(runs: list[RunRow]) -> str:
    names = {"model.d_model": "width", "model.n_layers": "layers"}
    same = []
    for name, word in names.items():
        values = {str(row.settings.get(name)) for row in runs}
        if len(values) == 1 and values != {"None"}:
            same.append(f"{word} {values.pop()}")
    return f"; {', '.join(same)}" if same else ""
