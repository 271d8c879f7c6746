"""The benchmark of fast-weight product-key memory: which cases belong together, measured group by group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from experiments.bench import model
from experiments.bench.case import ABSENT, FAILED, IMPLEMENTATIONS, OK, SCENES, WRONG, Case
from experiments.bench.equality import why_static_wrong, why_wrong
from experiments.bench.isolated import Arm, Failed, alone
from experiments.bench.machine import machine_of
from experiments.bench.measure import copy_bandwidth, spread, turns
from experiments.bench.package import DIFFERENCES, INSTALL, is_installed
from experiments.errors import UserError

LAYER_TOKENS = 1024
STATIC_READS = 32  # rows a token: 4 heads of 8
SIDE_BY_SIDE = "a process for every row, which take turns"
ONE_BY_ONE = "a process for every row, one after another"
# n, K = V, C, B and scope of what tests, tutorials and small sweeps run.
SMALL_SIZES = [
    (n, width, chunk, batch, scope)
    for n in (32, 64, 128)
    for width in (64, 128)
    for chunk in (16, 64)
    for batch, scope in ((8, "sequence"), (64, "shared"))
] + [(n, 64, chunk, batch, "sequence") for n in (32, 64) for chunk in (16, 64) for batch in (2, 64)]


@dataclass(frozen=True)
class Settings:
    """The command's options, checked. None: the default of the scene and device."""

    device: str = "cpu"
    n: tuple[int, ...] = (128, 256, 512)
    tokens: int | None = None
    batch: int | None = None
    chunk: int = 512
    width: int = 512
    impl: tuple[str, ...] | None = None
    scene: tuple[str, ...] = SCENES
    repeats: int = 5
    threads: int | None = None
    memory: bool = True
    model_size: str | None = None
    quick: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raise :class:`UserError` for what can't be run."""
        for name in ("tokens", "batch", "chunk", "width", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"bench: --{name} must be at least 1, got {value}")
        if self.width % 2:
            raise UserError(f"bench: --width must be even, to be cut in halves, got {self.width}")
        if self.chunk < 2:
            raise UserError(f"bench: --chunk must be at least 2, or nothing is ever written, got {self.chunk}")
        for n in self.n:
            if n < 8:
                raise UserError(f"bench: --n must be at least the 8 slots that a token reads, got {n}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("bench: --device cuda: this machine has no usable CUDA device; use --device cpu")
        if self.device == "cpu" and self.impl == ("triton",):
            raise UserError("bench: --impl triton runs on CUDA only; give --device cuda")


@dataclass
class Report:
    """What has been measured so far; complete JSON values at any moment."""

    settings: Settings
    machine: dict[str, Any]
    copy_bytes_per_s: float
    rows: list[dict[str, Any]] = field(default_factory=list)


def start(settings: Settings) -> Report:
    """Check the settings, set the threads, describe the machine, measure its copy bandwidth."""
    settings.check()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return Report(settings, machine_of(settings.device), alone(copy_bandwidth, settings.device))


def groups(s: Settings) -> Iterator[tuple[str, list[Case]]]:
    """Titles, and cases to be timed in turn."""
    on_gpu = s.device == "cuda"
    asked = IMPLEMENTATIONS if s.impl is None else s.impl
    fast = [impl for impl in asked if impl in (("sparse", "triton") if on_gpu else ("sparse",))]
    tables = [impl for impl in asked if impl in ("dense", "reference", "floor")]

    def case(scene: str, impl: str, scope: str, n: int, batch: int, tokens: int, backward: bool = False) -> Case:
        return Case(scene, impl, scope, n, batch, tokens, s.chunk, s.width, s.width, 8, s.device, s.seed, backward)

    for n in s.n:
        for scene, backward in (("prefill", False), ("train", True)):
            if scene not in s.scene:
                continue
            usual = (8 if backward else 1, 4096 if backward else 131072) if on_gpu else (1, 4096)
            batch, tokens = s.batch or usual[0], s.tokens or (1024 if s.quick else usual[1])
            title = f"{scene}, one shared memory, n={n}, {batch} x {tokens} tokens"
            yield title, [case(scene, impl, "shared", n, batch, tokens, backward) for impl in (*tables, *fast)]
    if "static" in s.scene:
        batch, tokens = s.batch or (8 if on_gpu else 1), s.tokens or (1024 if s.quick else 4096)
        for n in s.n:
            title = f"static read of {STATIC_READS} rows (reference: embedding_bag), n={n}, {batch} x {tokens} tokens"
            impls = [impl for impl in asked if impl == "reference"] + fast
            yield (
                title,
                [
                    Case(
                        "static",
                        impl,
                        "-",
                        n,
                        batch,
                        tokens,
                        s.chunk,
                        s.width,
                        s.width,
                        STATIC_READS,
                        s.device,
                        s.seed,
                        True,
                    )
                    for impl in impls
                ],
            )
    if "scopes" in s.scene:
        batch, tokens = s.batch or 8, s.tokens or (1024 if s.quick else 4096)
        # Whole tables for every sequence are compared only when named: they rarely fit.
        impls = [*fast, *(impl for impl in tables if impl == "floor" or s.impl is not None)]
        for n in s.n:
            for backward in (False, True):
                title = f"scopes, {'training' if backward else 'prefill'}, n={n}, {batch} x {tokens} tokens"
                pairs = [(impl, scope) for impl in impls for scope in ("shared", "sequence")]
                yield title, [case("scopes", impl, scope, n, batch, tokens, backward) for impl, scope in pairs]
    layered = [impl for impl in asked if impl in ("reference", "package")] + fast
    if "decode" in s.scene:
        for n in s.n:
            for scene, tokens in (("decode", s.chunk + s.chunk // 2 + 1), ("decode_write", 2 * s.chunk)):
                kind = "decode" if scene == "decode" else "decode, a chunk's last token"
                title = f"{kind}: one token through the layer after {tokens - 1}, n={n}"
                # The package writes a chunk when the next one's first token comes, so its chunk's end is not ours.
                impls = [impl for impl in layered if impl != "package" or scene == "decode"]
                yield title, [case(scene, impl, "sequence", n, 1, tokens) for impl in impls]
    if "layer" in s.scene:
        tokens = s.tokens or LAYER_TOKENS
        for n in s.n:
            for backward in (False, True):
                title = f"whole layer, {'training' if backward else 'forward'}, n={n}, 1 x {tokens} tokens"
                yield title, [case("layer", impl, "sequence", n, 1, tokens, backward) for impl in layered]
    if "small" in s.scene:
        yield from _small_groups(s, asked)
    if "model" in s.scene:
        yield _model_group(s, fast)


def _small_groups(s: Settings, asked: tuple[str, ...]) -> Iterator[tuple[str, list[Case]]]:
    impls = ["auto", *(impl for impl in ("reference", "sparse") if impl in asked)]
    for n, width, chunk, batch, scope in SMALL_SIZES[:1] if s.quick else SMALL_SIZES:
        for backward in (False, True):
            kind = "training" if backward else "forward"
            title = f"small layer, {kind}, n={n}, K=V={width}, C={chunk}, {batch} x 128 tokens, {scope} memory"
            cases = [
                Case("small", impl, scope, n, batch, 128, chunk, width, width, 8, s.device, s.seed, backward)
                for impl in impls
            ]
            yield title, cases


def _model_group(s: Settings, fast: list[str]) -> tuple[str, list[Case]]:
    size = model.SIZES[model_size(s)]

    def case(impl: str, scope: str) -> Case:
        return Case(
            "model", impl, scope, size.n, size.batch, size.tokens, size.chunk, size.value_dim, size.value_dim, 8,
            s.device, s.seed, True,
        )  # fmt: skip

    title = (
        f"training step of 12 layers of gated DeltaNet, D={size.d_model}, with fwpkm@{model.MEMORY_LAYERS} "
        f"(n={size.n}, K=V={size.value_dim}, C={size.chunk}) and without, {size.batch} x {size.tokens} tokens"
    )
    with_memory = [case(impl, scope) for impl in fast for scope in ("shared", "sequence")]
    return title, [case(model.WITHOUT, "-"), *with_memory]


def model_size(s: Settings) -> str:
    return s.model_size or ("paper" if s.device == "cuda" else "small")


def isolation(s: Settings) -> str:
    """How the rows of a group are kept from disturbing each other: on CUDA every process holds a context."""
    return ONE_BY_ONE if s.device == "cuda" else SIDE_BY_SIDE


def measure(report: Report, say: Callable[[str], None]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Measure group by group: title and rows of each, also appended to ``report``. ``say`` hears of every step.

    An interrupt (KeyboardInterrupt) first hands over the rows of what the group has measured, then passes on.
    """
    s = report.settings
    # The package computes something else; the floor computes nothing; auto is one of the others.
    cases = [case for _, group in groups(s) for case in group]
    refused = {}
    for check, suspects in (
        (
            why_wrong,
            {case.impl for case in cases if case.scene != "static"} & {"dense", "reference", "sparse", "triton"},
        ),
        (why_static_wrong, {case.impl for case in cases if case.scene == "static"}),
    ):
        for impl in sorted(suspects):
            say(f"checking {impl} against the float64 reference")
            refused[impl] = refused.get(impl) or _why_refused(check, impl, s)
    if "package" in {case.impl for case in cases} and not is_installed():
        refused["package"] = (ABSENT, INSTALL)
    for title, cases in groups(s):
        if not cases:
            continue
        outcomes: dict[Case, tuple[str, str]] = {}
        times: dict[Case, list[float]] = {case: [] for case in cases}
        peaks: dict[Case, int | None] = dict.fromkeys(cases)
        try:
            interrupted = None
            _measure_group(cases, refused, s, outcomes, times, peaks, lambda text, title=title: say(f"{title}: {text}"))
        except KeyboardInterrupt as error:
            interrupted = error
        finished = [case for case in cases if times[case] or case in outcomes]
        rows = [_row(case, outcomes.get(case), times[case], peaks[case], report) for case in finished]
        _compare(rows)
        report.rows += rows
        if rows:
            yield title, rows
        if interrupted is not None:
            raise interrupted


def _why_refused(check: Callable[..., str | None], impl: str, s: Settings) -> tuple[str, str] | None:
    try:
        why = alone(check, impl, s.device, s.seed)
    except (UserError, RuntimeError) as error:
        return FAILED, str(error)
    return (WRONG, why) if why else None


def _measure_group(
    cases: list[Case],
    refused: dict[str, tuple[str, str] | None],
    s: Settings,
    outcomes: dict[Case, tuple[str, str]],
    times: dict[Case, list[float]],
    peaks: dict[Case, int | None],
    say: Callable[[str], None],
) -> None:
    """Fill outcomes (of what can't be timed), times and peaks."""
    outcomes |= {case: why for case in cases if (why := refused.get(case.impl))}
    timed = [case for case in cases if case not in outcomes]
    for side_by_side in [timed] if isolation(s) == SIDE_BY_SIDE else [[case] for case in timed]:
        with ExitStack() as stack:
            _time_in_turn(side_by_side, stack, s, outcomes, times, peaks, say)


def _time_in_turn(
    cases: list[Case],
    stack: ExitStack,
    s: Settings,
    outcomes: dict[Case, tuple[str, str]],
    times: dict[Case, list[float]],
    peaks: dict[Case, int | None],
    say: Callable[[str], None],
) -> None:
    with_memory = s.memory and s.device == "cpu"
    arms: dict[Case, Arm] = {}
    for case in cases:
        say(f"{case.impl} {case.scope}: first calls")
        is_sized = with_memory and case.scene not in ("small", "model")
        arm = Arm(case, torch.get_num_threads(), is_sized, model.SIZES[model_size(s)])
        stack.callback(arm.close)
        try:
            first = arm.start()
        except Failed as failure:
            outcomes[case] = failure.status, failure.note
            continue
        arms[case], peaks[case] = arm, first.peak_bytes
        times[case] += first.times
    for case in turns(list(arms), times, s.repeats):
        if case in outcomes:
            continue
        try:
            times[case].append(arms[case].turn())
            say(f"{case.impl} {case.scope}: {times[case][-1]:.3g} s")
        except Failed as failure:
            outcomes[case] = failure.status, failure.note


def _row(
    case: Case, outcome: tuple[str, str] | None, times: list[float], peak: int | None, report: Report
) -> dict[str, Any]:
    row = {**case.as_dict(), "status": OK, "note": "", "seconds": None, "seconds_min": None, "seconds_max": None}
    row |= {"n_repeats": 0, "tokens_per_s": None, "peak_bytes": peak, "bound_bytes": case.bound_bytes()}
    row |= {"bandwidth_share": None, "times_dense": None, "times_without": None}
    if outcome is not None:
        row["status"], row["note"] = outcome
        return row
    row |= spread(times)
    n_tokens = 1 if case.scene.startswith("decode") else case.n_tokens_total
    row["tokens_per_s"] = n_tokens / row["seconds"]
    if row["bound_bytes"] is not None:
        row["bandwidth_share"] = row["bound_bytes"] / row["seconds"] / report.copy_bytes_per_s
    if case.impl == "package":
        row["note"] = DIFFERENCES
    return row


def _compare(rows: Iterable[dict[str, Any]]) -> None:
    """How many times faster each is than dense, and than the model without the memory, of its group."""
    rows = [row for row in rows if row["seconds"]]
    for name, impl in (("times_dense", "dense"), ("times_without", model.WITHOUT)):
        of_base = {row["scope"]: row["seconds"] for row in rows if row["impl"] == impl}
        for row in rows:
            base = of_base.get("-") or of_base.get(row["scope"])
            row[name] = base / row["seconds"] if base else None
