"""The benchmark of all mixers: sizes, then time and memory by T, training, and what each adds to its kernel."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.bench import meters, raw
from experiments.bench.case import FAILED, NO_MEMORY, OK
from experiments.bench.energy import MIN_S, Energy
from experiments.bench.growth import growth
from experiments.bench.layers import Bench, Measured, Operation, Point, parse_layers
from experiments.bench.machine import machine_of
from experiments.bench.measure import TURN_S, OutOfMemory, cuda_peak, is_out_of_memory, seconds, spread, turn, turns
from experiments.bench.peak import PeakServer, peak_server
from experiments.device import Compute
from experiments.errors import UserError
from experiments.turns import Turns
from mixers.config import parse_overrides

SCHEMA = 1
LATE = "not started"
# The share by which a wrapper may be slower than its kernel.
GOAL = 0.03
N_KERNEL_ROUNDS = 15
N_BOOTSTRAP = 1000
# One token takes a millisecond: it is repeated more often.
DECODE_ROUNDS = 4
# A first call shorter than this is followed by a second that doesn't count either.
SHORT_S = 0.2
Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """The command's options, checked. None: the default of the device, see ``resolved``."""

    mixers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    device: str = "cpu"
    precision: str | None = None
    d_model: int | None = None
    tokens: tuple[int, ...] = ()
    train_tokens: int | None = None
    train_batch: int | None = None
    kernel_tokens: int | None = None
    flop_tokens: int = 512
    repeats: int = 5
    case_s: float = 0.5
    limit_s: float | None = None
    threads: int | None = None
    memory: bool = True
    untuned: bool = False
    quick: bool = False
    seed: int = 0

    def resolved(self) -> Settings:
        """With nothing left open. Raise :class:`UserError` for what can't be run."""
        on_gpu = self.device == "cuda"
        if on_gpu and not torch.cuda.is_available():
            raise UserError("bench: --device cuda: this machine has no usable CUDA device; use --device cpu")
        if self.untuned and not on_gpu:
            raise UserError("bench: --untuned is about Triton's kernels, on CUDA only; leave it out, or --device cuda")
        usual = {
            "precision": "bf16" if on_gpu else "float32",
            "d_model": 1024 if on_gpu else 256,
            "tokens": (512, 2048, 8192, 32768, 131072) if on_gpu else (512, 1024, 2048, 4096),
            "train_tokens": 4096 if on_gpu else 1024,
            "train_batch": 4 if on_gpu else 1,
            "kernel_tokens": 16384 if on_gpu else 2048,
        }
        missing = {name: value for name, value in usual.items() if getattr(self, name) in (None, ())}
        found = Settings(**{**vars(self), **missing})
        found = Settings(**{**vars(found), "tokens": tuple(sorted(set(found.tokens)))})
        for name in ("d_model", "train_tokens", "train_batch", "kernel_tokens", "repeats", "threads"):
            value = getattr(found, name)
            if value is not None and value < 1:
                raise UserError(f"bench: --{name.replace('_', '-')} must be at least 1, got {value}")
        if found.tokens[0] < 2:
            raise UserError(f"bench: --tokens must be at least 2, got {found.tokens[0]}")
        return found

    @property
    def compute(self) -> Compute:
        return Compute(torch.device(self.device), torch.bfloat16 if self.precision == "bf16" else None)


@dataclass
class Report:
    """What has been measured so far; complete JSON values at any moment."""

    settings: Settings
    machine: dict[str, Any]
    energy: str
    layers: list[Row] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    kernels: list[Row] = field(default_factory=list)

    def growths(self) -> list[Row]:
        """The exponent of every cost that was measured at two values of T or more."""
        found = []
        for layer in self.layers:
            mine = [row for row in self.rows if row["label"] == layer["label"] and row["status"] == OK]
            of_scene = {scene: [row for row in mine if row["scene"] == scene] for scene in ("prefill", "decode")}
            costs = {
                "prefill_seconds": {row["tokens"]: row["seconds"] for row in of_scene["prefill"]},
                "decode_seconds": {row["tokens"]: row["seconds"] for row in of_scene["decode"]},
                "peak_bytes": {r["tokens"]: r["peak_bytes"] for r in of_scene["prefill"] if r["peak_bytes"]},
                "state_bytes": {row["tokens"]: row["bytes"] for row in layer.get("state", [])},
            }
            for cost, values in costs.items():
                fit = growth(values)
                if fit is not None:
                    found.append({"label": layer["label"], "cost": cost, **fit._asdict()})
        return found


def start(settings: Settings) -> tuple[Report, list[Measured]]:
    """Check the settings and the layers, set the threads, describe the machine."""
    settings = settings.resolved()
    assert settings.d_model is not None
    layers = parse_layers(settings.mixers, settings.d_model, parse_overrides(settings.options), settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.untuned:
        from mixers.kernels.untuned import take_the_first_configuration

        take_the_first_configuration()
    energy = Energy(settings.compute.device)
    return Report(settings, machine_of(settings.device), energy.source or f"unknown: {energy.why_not}"), layers


def measure(
    report: Report, layers: list[Measured], say: Say, runs: Path | None = None
) -> Iterator[tuple[str, list[Row]]]:
    """Measure group by group: what it is (``layers``, ``points``, ``kernels``) and its rows, also kept in ``report``.

    A timing waits for the trainings of ``runs``, and they for it. An interrupt first hands over what the group has.
    """
    with ExitStack() as stack:
        turn = stack.enter_context(Turns(runs if runs is not None and runs.is_dir() else None, report.settings.device))
        session = _Session(report, say, turn)
        yield from session.sizes(layers)
        layers = [layer for layer in layers if layer.label in session.benches]
        if report.settings.memory and report.settings.device == "cpu" and layers:
            session.peaks = stack.enter_context(
                peak_server(layers, report.settings.plugins, torch.get_num_threads(), report.settings.seed)
            )
        # The longest last: what a time limit cuts off.
        yield from session.kernels()
        yield from session.training()
        for n_tokens in report.settings.tokens:
            yield from session.by_length(n_tokens)


class _Session:
    """One run of the benchmark: the layers, and how a group of points is measured."""

    def __init__(self, report: Report, say: Say, turn: Turns) -> None:
        self.report, self.say, self.turn = report, say, turn
        self.settings = report.settings
        self.compute = self.settings.compute
        self.energy = Energy(self.compute.device)
        self.benches: dict[str, Bench] = {}
        self.states: dict[str, meters.StateMeter] = {}
        self.peaks: PeakServer | None = None
        self.began = time.monotonic()

    @property
    def is_late(self) -> bool:
        return self.settings.limit_s is not None and time.monotonic() - self.began > self.settings.limit_s

    def sizes(self, layers: list[Measured]) -> Iterator[tuple[str, list[Row]]]:
        s = self.settings
        for measured in layers:
            self.say(f"{measured.label}: sizes and FLOPs")
            row: Row = {"label": measured.label, "mixer": measured.name, "options": measured.options}
            self.report.layers.append(row)
            try:
                bench = Bench(measured, self.compute, s.seed)
                with self.compute.autocast():  # on which the choice may depend
                    row |= {"status": OK, "note": "", "impl": bench.layer.impl, **meters.sizes(bench.layer)}
                row |= meters.flops(measured, self.compute, min(s.flop_tokens, s.tokens[-1]), s.seed)
            except Exception as error:  # noqa: BLE001  a stranger's layer may raise anything; the others are measured
                row["status"], row["note"] = _outcome(error)
                continue
            self.benches[measured.label] = bench
            if bench.resumable:
                self.states[measured.label] = meters.StateMeter(bench)
        yield "layers", self.report.layers

    def by_length(self, n_tokens: int) -> Iterator[tuple[str, list[Row]]]:
        """Prefill of ``n_tokens``, the state after them, and one token more."""
        points = [Point(label, "prefill", n_tokens) for label in self.benches]
        is_longest = n_tokens == self.settings.tokens[-1]
        prefill = lambda point: self.benches[point.label].operation(point)  # noqa: E731
        yield from self._group(points, prefill, with_energy=is_longest)
        failed = {row["label"] for row in self.report.rows if row["tokens"] == n_tokens and row["status"] != OK}

        def decode(point: Point) -> Operation:
            state = self.states[point.label].measure(n_tokens)
            about = next(layer for layer in self.report.layers if layer["label"] == point.label)
            about |= self.states[point.label].summary()
            return self.benches[point.label].decode(state)

        yield from self._group(
            [Point(label, "decode", n_tokens) for label in self.states if label not in failed], decode
        )

    def training(self) -> Iterator[tuple[str, list[Row]]]:
        s = self.settings
        assert s.train_tokens is not None
        assert s.train_batch is not None
        points = [Point(label, "train", s.train_tokens, s.train_batch) for label in self.benches]
        yield from self._group(points, lambda point: self.benches[point.label].operation(point), with_energy=True)

    def _group(
        self, points: list[Point], prepare: Callable[[Point], Operation], with_energy: bool = False
    ) -> Iterator[tuple[str, list[Row]]]:
        """Time all points, of one scene, in turn. Whatever fails in one of them is its row."""
        if not points:
            return
        outcomes: dict[Point, tuple[str, str]] = {}
        times: dict[Point, list[float]] = {point: [] for point in points}
        extras: dict[Point, Row] = {point: {"peak_bytes": None, "joules_per_token": None} for point in points}
        interrupted = None
        try:
            self._time(points, prepare, with_energy, outcomes, times, extras)
        except KeyboardInterrupt as error:
            interrupted = error
        rows = [
            self._row(point, outcomes.get(point), times[point], extras[point])
            for point in points
            if times[point] or point in outcomes
        ]
        self.report.rows += rows
        if rows:
            yield "points", rows
        if interrupted is not None:
            raise interrupted

    def _time(
        self,
        points: list[Point],
        prepare: Callable[[Point], Operation],
        with_energy: bool,
        outcomes: dict[Point, tuple[str, str]],
        times: dict[Point, list[float]],
        extras: dict[Point, Row],
    ) -> None:
        """Fill outcomes (of what can't be timed), times and extras."""
        s, operations = self.settings, {}
        on_gpu = s.device == "cuda"
        for point in points:
            if self.is_late:
                outcomes[point] = LATE, f"the time limit of {s.limit_s:g} s was over"
                continue
            self.say(f"{point.label}: {point.scene} {point.tokens}, first calls")
            try:
                if self.peaks is not None and point.scene != "decode":
                    # This also finds out, in a process of its own, whether the case fits.
                    extras[point]["peak_bytes"] = self.peaks.bytes(point)
                operation = prepare(point)
                first = seconds(operation, s.device)
                if on_gpu and point.scene != "decode":
                    extras[point]["peak_bytes"] = cuda_peak(operation)
                elif on_gpu or first < SHORT_S:
                    seconds(operation, s.device)
                operations[point] = operation
            except Exception as error:  # noqa: BLE001  any failure of one is a result of the run, not its end
                outcomes[point] = _outcome(error)
        with self.turn.alone():
            n_rounds = s.repeats * (DECODE_ROUNDS if points[0].scene == "decode" else 1)
            for point in turns(list(operations), times, n_rounds, s.case_s):
                if point in outcomes:
                    continue
                try:
                    times[point].append(seconds(operations[point], s.device))
                except Exception as error:  # noqa: BLE001  as above
                    outcomes[point] = _outcome(error)
            if with_energy and self.energy.is_known:
                for point in operations:
                    if point not in outcomes and not self.is_late:
                        extras[point]["joules_per_token"] = self._joules_per_token(operations[point], point)
        operations.clear()
        gc.collect()

    def _joules_per_token(self, operation: Operation, point: Point) -> float:
        self.compute.synchronize()
        before, began, n_calls = self.energy.joules(), time.monotonic(), 0
        while time.monotonic() - began < MIN_S:
            operation()
            self.compute.synchronize()
            n_calls += 1
        return (self.energy.joules() - before) / (n_calls * point.batch * point.tokens)

    def _row(self, point: Point, outcome: tuple[str, str] | None, times: list[float], extras: Row) -> Row:
        row = {
            **vars(point),
            "mixer": self.benches[point.label].measured.name,
            "status": OK,
            "note": "",
            "seconds": None,
            "seconds_min": None,
            "seconds_max": None,
        }
        row |= {"n_repeats": 0, "tokens_per_s": None, "state_bytes": None, **extras}
        if outcome is not None:
            row["status"], row["note"] = outcome
            return row
        row |= spread(times)
        n_tokens = point.batch * point.tokens
        if point.scene == "decode":
            n_tokens, row["state_bytes"] = 1, self.states[point.label].rows[point.tokens]["bytes"]
        row["tokens_per_s"] = n_tokens / row["seconds"]
        return row

    def kernels(self) -> Iterator[tuple[str, list[Row]]]:
        """What each layer adds to the kernels that it calls, forward alone and with backward."""
        n_tokens = self.settings.kernel_tokens
        assert n_tokens is not None
        for label, bench in self.benches.items():
            for backward in (False, True):
                if self.is_late:
                    break
                row: Row = {"label": label, "tokens": n_tokens, "batch": 1, "backward": backward}
                try:
                    self.say(f"{label}: next to its kernel{', with backward' if backward else ''}")
                    found = self._next_to_kernel(bench, n_tokens, backward)
                except Exception as error:  # noqa: BLE001  as above
                    status, note = _outcome(error)
                    found = {"status": status, "note": note}
                if found is None:
                    break
                self.report.kernels.append(row | found)
                gc.collect()
        yield "kernels", self.report.kernels

    def _next_to_kernel(self, bench: Bench, n_tokens: int, backward: bool) -> Row | None:
        s = self.settings
        recorded = raw.record(bench, n_tokens, 1, backward, s.device)
        if not recorded.kernels:
            return None
        arms = {
            "kernel": raw.replay(recorded.kernels, backward, bench),
            "layer": bench.train(n_tokens, 1) if backward else bench.prefill(n_tokens),
        }
        if recorded.operations:
            arms["operation"] = raw.replay(recorded.operations, backward, bench)
        for operation in arms.values():
            seconds(operation, s.device)
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        with self.turn.alone():
            for arm in turns(list(arms), times, N_KERNEL_ROUNDS, 2 * s.case_s):
                times[arm].append(turn(arms[arm], s.device, min(TURN_S, s.case_s / 10)))
        found: Row = {
            "status": OK,
            "note": "",
            "kernel": ", ".join(dict.fromkeys(call.name for call in recorded.kernels)),
            "n_kernel_calls": len(recorded.kernels),
            **{f"{arm}_seconds": statistics.median(values) for arm, values in times.items()},
            "n_repeats": min(map(len, times.values())),
        }
        found["kernel_share"] = found["kernel_seconds"] / found["layer_seconds"]
        return found | overhead(times.get("operation"), times["kernel"])


def overhead(wrapped: list[float] | None, kernel: list[float]) -> Row:
    """How much longer the wrapped calls take: the median over rounds of the ratio in a round, which a machine's drift
    leaves alone, with a 95 % bootstrap interval over the rounds.

    met: True or False where the whole interval is on one side of the goal, None where it can't be told.
    """
    if wrapped is None:
        return {"operation_seconds": None, **dict.fromkeys(("overhead", "overhead_low", "overhead_high", "met"))}
    n = min(len(wrapped), len(kernel))
    ratios = [ours / theirs - 1 for ours, theirs in zip(wrapped[:n], kernel[:n], strict=True)]
    draw = random.Random(0)
    found = sorted(statistics.median(draw.choices(ratios, k=n)) for _ in range(N_BOOTSTRAP))
    low, high = found[int(0.025 * N_BOOTSTRAP)], found[int(0.975 * N_BOOTSTRAP) - 1]
    met = True if high <= GOAL else False if low > GOAL else None
    return {"overhead": statistics.median(ratios), "overhead_low": low, "overhead_high": high, "met": met}


def _outcome(error: Exception) -> tuple[str, str]:
    """Status and note of what raised ``error``."""
    is_full = isinstance(error, OutOfMemory) or is_out_of_memory(error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    text = " ".join(str(error).split())[:300]
    return (NO_MEMORY if is_full else FAILED), text if isinstance(
        error, UserError
    ) else f"{type(error).__name__}: {text}"
