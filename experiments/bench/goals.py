"""What the memory shall reach, next to what was measured."""

from __future__ import annotations

from typing import Any

from mixers.fwpkm import FastWeightPKM, FastWeightPKMConfig

Row = dict[str, Any]
SIZE = {"n": 512, "chunk": 512, "key_dim": 512, "value_dim": 512}


def _rows(rows: list[Row], **fields: object) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def _ratio(
    rows: list[Row], over: dict[str, object], under: dict[str, object], field: str = "seconds", **common: object
) -> float | None:
    """Largest n measured for both: ``field`` of the one over that of the other."""
    found = {}
    for name, fields in (("over", over), ("under", under)):
        found[name] = {row["n"]: row[field] for row in _rows(rows, **common, **fields) if row.get(field)}
    both = sorted(set(found["over"]) & set(found["under"]))
    return found["over"][both[-1]] / found["under"][both[-1]] if both else None


def _goal(
    name: str, measured: float | None, bound: float, rows: list[Row], at: dict[str, object], at_least: bool = True
) -> Row:
    """``met`` is None where nothing was measured, or not at the goal's sizes."""
    is_at_size = bool(_rows(rows, **at))
    is_met = None
    if measured is not None and is_at_size:
        is_met = measured >= bound if at_least else measured <= bound
    return {
        "name": name, "measured": measured, "goal": f"{'>=' if at_least else '<='} {bound:g}", "met": is_met,
        "at_goal_sizes": is_at_size,
    }  # fmt: skip


def goals(rows: list[Row], device: str) -> list[Row]:
    """Every goal of ``device`` with its measured value, None where a row for it is missing.

    ``measured`` is from median times and decides. ``of_fastest``, from each row's fastest call, is what a machine that
    does other work as well disturbs least: where the two disagree, measure again on an idle one.
    """
    timed = [row for row in rows if row["status"] == "measured"]
    fastest = [row | {"seconds": row["seconds_min"]} for row in timed]
    pairs = zip(_goals(timed, device), _goals(fastest, device), strict=True)
    return [goal | {"of_fastest": other["measured"]} for goal, other in pairs]


def _goals(timed: list[Row], device: str) -> list[Row]:
    fast = "triton" if device == "cuda" else "sparse"
    found = _cuda(timed, fast) if device == "cuda" else _cpu(timed, fast)
    kinds = (("prefill", False), ("training", True))
    for kind, backward in kinds:
        measured = _ratio(
            timed, {"scope": "sequence"}, {"scope": "shared"}, scene="scopes", impl=fast, backward=backward
        )
        at = {"scene": "scopes", "batch": 8} | SIZE
        found.append(_goal(f"{fast} {kind}, sequence over shared", measured, 1.5, timed, at, at_least=False))
    found.append(
        _goal("auto over the faster, worst small size", worst_auto(timed), 1.1, timed, {"scene": "small"}, False)
    )
    return found


def _cpu(rows: list[Row], fast: str) -> list[Row]:
    found = []
    for scene, n_times in (("prefill", 100), ("train", 60)):
        at = {"scene": scene, "tokens": 4096, "batch": 1} | SIZE

        def over_fast(other: str, scene: str = scene, field: str = "seconds") -> float | None:
            return _ratio(rows, {"impl": other}, {"impl": fast}, field, scene=scene)

        found.append(_goal(f"{scene}: dense over {fast}", over_fast("dense"), n_times, rows, at))
        floor = over_fast("floor")
        found.append(_goal(f"{scene}: {fast} over floor", floor and 1 / floor, 3, rows, at, at_least=False))
        memory = over_fast("dense", field="peak_bytes")
        found.append(_goal(f"{scene}: peak memory, {fast} over dense", memory and 1 / memory, 0.2, rows, at, False))
    package = _ratio(rows, {"impl": "package"}, {"impl": fast}, scene="layer", backward=False)
    at = {"scene": "layer", "impl": "package", "tokens": 1024, "batch": 1} | SIZE
    found.append(_goal(f"layer forward: package over {fast}", package, 100, rows, at))
    return found


def _cuda(rows: list[Row], fast: str) -> list[Row]:
    train = {"scene": "train", "impl": fast, "batch": 8, "tokens": 4096} | SIZE
    static = {"scene": "static", "impl": fast, "batch": 8, "tokens": 4096} | SIZE
    prefill = {"scene": "prefill", "impl": fast, "batch": 1, "tokens": 131072} | SIZE

    def value(at: dict[str, object], field: str, unit: float) -> float | None:
        row = next(iter(_rows(rows, **at)), None)
        return None if row is None or row[field] is None else row[field] * unit

    with_memory = max(
        (row["tokens_per_s"] for row in _rows(rows, scene="model") if row["impl"] != "without"), default=None
    )
    without = max((row["tokens_per_s"] for row in _rows(rows, scene="model", impl="without")), default=None)
    ratio = with_memory / without if with_memory and without else None
    return [
        _goal("training step, ms", value(train, "seconds", 1e3), 3, rows, train, at_least=False),
        _goal("prefill of 128K tokens, ms", value(prefill, "seconds", 1e3), 8, rows, prefill, at_least=False),
        _goal("training step, extra memory, GB", value(train, "peak_bytes", 1e-9), 1, rows, train, at_least=False),
        _goal(
            f"static read: embedding_bag over {fast}",
            _ratio(rows, {"impl": "reference"}, {"impl": fast}, scene="static"),
            5,
            rows,
            static,
        ),
        _goal(
            "model with the memory, share of its speed without", ratio, 0.75, rows, {"scene": "model", "tokens": 4096}
        ),
    ]


def worst_auto(rows: list[Row]) -> float | None:
    """Largest ratio of ``auto`` to the faster of reference and sparse, over the small sizes.

    ``auto`` and the one of the two that it stands for run the same code: that takes the mean of both rows, whose
    difference is the measurement's.
    """
    sizes, worst, chosen = ("n", "value_dim", "chunk", "batch", "scope", "backward"), None, _auto_stands_for()
    for row in _rows(rows, scene="small", impl="auto"):
        same_size = {key: row[key] for key in sizes}
        found = {other["impl"]: other["seconds"] for other in _rows(rows, scene="small", **same_size)}
        if {"reference", "sparse"} <= found.keys():
            found[chosen] = (found[chosen] + found["auto"]) / 2
            worst = max(worst or 0.0, found[chosen] / min(found["reference"], found["sparse"]))
    return worst


def _auto_stands_for() -> str:
    """The implementation that the layer takes on a CPU with its default options."""
    return FastWeightPKM(FastWeightPKMConfig(d_model=8, key_dim=8, value_dim=8, n_subkeys=8, top_k=2)).impl
