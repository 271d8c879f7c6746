"""What fast-weight memories did during training, read from the metrics that runs wrote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from analysis.runs import RunRow
from experiments.records import read_metrics, run_folder

# by their last name under mixer/<layer>/
MEMORY_METRICS = (
    "gate_mean",
    "gate_above_10",
    "gate_above_50",
    "gate_above_90",
    "slot_coverage",
    "slot_collisions",
    "slot_kl_uniform",
)


@dataclass(frozen=True)
class MemoryUse:
    """One run and layer: ``values`` by metric over ``steps``, None where a step has none."""

    arm: str
    cell: str
    seed: int
    layer: str
    steps: list[int]
    values: dict[str, list[float | None]]


def memory_use(runs: Path, sweep: str, replicates: Iterable[RunRow]) -> list[MemoryUse]:
    """Of all finished replicates that logged the use of their slots; runs of an arm that logs none are read once."""
    found: list[MemoryUse] = []
    without: set[str] = set()
    for row in replicates:
        if row.outcome != "finished" or row.arm in without:
            continue
        lines = read_metrics(run_folder(runs, sweep, row.key))
        layers = {name.rpartition("/")[0] for line in lines for name in line if name.endswith("/slot_coverage")}
        if not layers:
            without.add(row.arm)
        for layer in sorted(layers):
            kept = [line for line in lines if f"{layer}/slot_coverage" in line]
            values = {name: [line.get(f"{layer}/{name}") for line in kept] for name in MEMORY_METRICS}
            known = {name: series for name, series in values.items() if any(value is not None for value in series)}
            place = layer.removeprefix("mixer/")
            found.append(MemoryUse(row.arm, row.cell, row.seed, place, [line["step"] for line in kept], known))
    return found
