"""The comparison for other programs and for papers: CSV of the runs, tables as Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.axes import axis, human
from analysis.comparison import Comparison
from analysis.findings import Findings
from analysis.findings_table import p_text, threshold_text
from analysis.method import method
from analysis.runs import RunRow
from analysis.table import spread
from sweeps.saved import SavedSweep

_COSTS = ("state_bytes", "params", "flops_per_token")


@dataclass(frozen=True)
class TextTable:
    """``numbers``: how many of the last columns hold numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    numbers: int


def runs_csv(saved: SavedSweep, rows: Sequence[RunRow]) -> str:
    """One line per run as it was recorded, tuning trials and lost runs among them: nothing averaged, nothing left out.

    Columns: who the run is, how it ended, the varied factors and tuned settings, then every metric and cost.
    """
    factors = list(dict.fromkeys(name for cell in saved.cells.values() for name in cell))
    settings = [name for name in saved.tune if name not in factors]
    metrics = sorted({name for row in rows for name in row.metrics})
    costs = sorted({name for row in rows for name in row.cost})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ["arm", "cell", "role", "seed", "outcome", "reason", "pattern", "key", "data_hash"]
    writer.writerow([*head, *factors, *settings, *metrics, *(f"cost/{name}" for name in costs)])
    for row in rows:
        writer.writerow(
            [
                *(_cell(getattr(row, name)) for name in head),
                *(_cell(row.factors.get(name)) for name in factors),
                *(_cell(row.settings.get(name)) for name in settings),
                *(_cell(row.metrics.get(name)) for name in metrics),
                *(_cell(row.cost.get(name)) for name in costs),
            ]
        )
    return buffer.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, list | dict | tuple):
        return json.dumps(value)
    # a spreadsheet takes text that begins so for a formula
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return "" if value is None else value


def report_tables(saved: SavedSweep, lines: Sequence[Comparison], found: Findings) -> list[TextTable]:
    """Means, paired differences, capacity, tuning and exclusions, each where there is something in it."""
    tables = [_means(saved, lines, found), _paired(found), _capacity(found), _tuning(found), _excluded(found)]
    return [table for table in tables if table.rows]


def _means(saved: SavedSweep, lines: Sequence[Comparison], found: Findings) -> TextTable:
    costs = list(dict.fromkeys([found.x.removeprefix("cost/"), *_COSTS])) if found.x.startswith("cost/") else [*_COSTS]
    axes = [axis(f"cost/{name}", saved.metric) for name in costs]
    probability = found.pareto_probability
    rows = [
        [
            line.cell,
            line.arm,
            spread(line.metrics.get(found.y)),
            f"{line.n_seeds}/{line.n_planned}",
            "yes" if line.pareto else "no",
            "–" if probability.get((line.arm, line.cell)) is None else f"{probability[line.arm, line.cell]:.2f}",
            *(human(line.cost.get(name), of.unit) for name, of in zip(costs, axes, strict=True)),
            "; ".join(line.notes),
        ]
        for cell in saved.cells
        for line in lines
        if line.cell == cell
    ]
    headings = ["cell", "arm", f"{found.y} (mean ± 95 %)", "seeds", "on front", "P(front)", *(a.label for a in axes)]
    return TextTable("Means over seeds", [*headings, "notes"], rows, 0)


def _paired(found: Findings) -> TextTable:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:+.4g}"

    rows = [
        [
            each.cell,
            each.a,
            each.b,
            number(each.mean),
            f"[{number(each.low)}, {number(each.high)}]",
            p_text(each.p),
            p_text(each.p_holm),
            *(str(n) for n in (each.n, each.n_unfinished, each.n_other_data)),
        ]
        for each in found.paired
    ]
    headings = ["cell", "arm", "minus", "difference", "95 %", "p", "p Holm", "pairs", "unfinished", "other data"]
    return TextTable(f"Paired differences of {found.y}, Holm over {len(rows)}", headings, rows, 7)


def _capacity(found: Findings) -> TextTable:
    rows = []
    for each in found.capacity:
        known = [point for point in each.points if point.bits is not None and point.bits_at_least is not None]
        best = max(known, key=lambda point: (point.bits_per_byte or 0.0, point.bits or 0.0), default=None)
        rows.append(
            [
                each.arm,
                each.group,
                *(threshold_text(level, each).replace("\\[", "[") for level in each.thresholds),
                *(
                    ["–"] * 4
                    if best is None
                    else [
                        f"{best.bits:.3g}",
                        f"{best.bits_at_least:.3g}",
                        human(best.state_bytes, "bytes"),
                        "–" if best.bits_per_byte is None else f"{best.bits_per_byte:.3g}",
                    ]
                ),
            ]
        )
    headings = ["arm", "at", "pairs at 90 %", "pairs at 99 %", "bits", "bits at least", "state", "bits per byte"]
    return TextTable("Pairs and bits recalled", headings, rows, 6)


def _tuning(found: Findings) -> TextTable:
    rows = [
        [
            each.cell,
            each.arm,
            f"{each.n_planned - each.ended.get('missing', 0)}/{each.n_planned}",
            ", ".join(f"{n} {outcome}" for outcome, n in each.ended.items() if n),
            "; ".join(f"{of.setting}={of.best:.4g}" for of in each.sensitivity)
            or "; ".join(f"{name}={value}" for name, value in each.chosen.items()),
            "; ".join(
                f"{'≤ ' if of.open_low else ''}{of.low:.2g} to {of.high:.2g}{' ≤' if of.open_high else ''}"
                for of in each.sensitivity
                if of.low is not None and of.high is not None
            )
            or "–",
            "; ".join(of.edge for of in each.sensitivity if of.edge) or "no",
        ]
        for each in found.tuning
    ]
    headings = ["cell", "arm", "trials", "ended", "best", "within 5 %", "at edge"]
    return TextTable("Tuning on the select split", headings, rows, 0)


def _excluded(found: Findings) -> TextTable:
    rows = [
        [each.cell, each.arm, each.role, str(each.seed), each.outcome, each.reason, each.key]
        for each in found.exclusions
    ]
    return TextTable("Runs in no mean", ["cell", "arm", "role", "seed", "outcome", "reason", "key"], rows, 0)


def markdown_text(saved: SavedSweep, rows: Sequence[RunRow], tables: Sequence[TextTable], found: Findings) -> str:
    """Question, tables and method, as GitHub's Markdown."""
    parts = [f"# {_md(saved.name)}", _md(saved.question)]
    for table in tables:
        align = ["---"] * (len(table.headings) - table.numbers) + ["---:"] * table.numbers
        lines = [table.headings, align, *table.rows]
        parts += [
            f"## {_md(table.title)}",
            "\n".join("| " + " | ".join(_md(cell) for cell in line) + " |" for line in lines),
        ]
    told = method(saved, rows, found)
    parts.append("## Method")
    parts += [f"**{section['title']}.** {_md(section['text'])}" for section in told["sections"]]
    parts.append("```\n" + "\n".join(told["commands"]) + "\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def _md(text: str) -> str:
    for character in ("\\", "|", "<", "*", "_", "`", "["):
        text = text.replace(character, "\\" + character)
    return text.replace("\n", " ")


def latex_text(tables: Sequence[TextTable]) -> str:
    """One ``table`` each, for a document that uses booktabs."""
    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables:
        columns = "l" * (len(table.headings) - table.numbers) + "r" * table.numbers
        rows = [" & ".join(_tex(cell) for cell in line) + r" \\" for line in table.rows]
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering\small",
                    rf"\caption{{{_tex(table.title)}}}",
                    rf"\begin{{tabular}}{{{columns}}}",
                    r"\toprule",
                    " & ".join(_tex(heading) for heading in table.headings) + r" \\",
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "±": r"$\pm$", "–": "--",
    "≥": r"$\geq$", "≤": r"$\leq$", "[": "{[}", "]": "{]}",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text).replace("\n", " ")
