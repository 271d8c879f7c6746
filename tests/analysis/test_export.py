from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from analysis.comparison import compare
from analysis.export import latex_text, markdown_text, report_tables, runs_csv
from analysis.findings import findings
from analysis.runs import RunRow, rows_from_records
from sweeps.saved import SavedSweep
from tests.analysis import planted
from tests.analysis.conftest import HOSTILE


def read(tmp_path: Path, saved: SavedSweep) -> list[RunRow]:
    planted.write_records(tmp_path, saved)
    return rows_from_records(tmp_path, saved.name)[1]


def test_csv_holds_every_run_as_it_was_measured(tmp_path: Path) -> None:
    saved = planted.plan()
    rows = read(tmp_path, saved)
    lines = list(csv.DictReader(io.StringIO(runs_csv(saved, rows))))
    assert len(lines) == 53
    lost = next(line for line in lines if line["outcome"] == "diverged")
    assert (lost["arm"], lost["task.n_pairs"], lost["report/accuracy"]) == ("FwPKM", "64", "")
    assert lost["reason"] == "loss is NaN at step 120"
    for line, row in zip(lines, rows, strict=True):
        assert line["report/accuracy"] == ("" if row.outcome == "diverged" else str(row.metrics["report/accuracy"]))
        assert float(line["cost/params"]) == row.cost["params"]


def test_text_is_never_a_formula_of_a_spreadsheet(tmp_path: Path) -> None:
    saved = planted.plan(arms={"=1+1": "softmax", "@x": "pkm"}, pairs=(8,))
    lines = list(csv.DictReader(io.StringIO(runs_csv(saved, read(tmp_path, saved)))))
    assert {line["arm"] for line in lines} == {"'=1+1", "'@x"}


def test_markdown_and_latex_hold_the_tables_and_no_markup_of_names(tmp_path: Path) -> None:
    for saved in (planted.plan(), planted.plan("hostile", arms=HOSTILE, pairs=(8, 32))):
        rows = read(tmp_path, saved)
        lines = compare(saved, rows)
        found = findings(saved, rows, lines)
        tables = report_tables(saved, lines, found)
        assert [table.title.split(" of ")[0].split(",")[0] for table in tables][:3] == [
            "Means over seeds",
            "Paired differences",
            "Pairs and bits recalled",
        ]
        text = markdown_text(saved, rows, tables, found)
        for table in tables:
            for row in table.rows:
                assert len(row) == len(table.headings)
        for line in text.splitlines():
            if line.startswith("|"):
                bars = len(re.findall(r"(?<!\\)\|", line))
                assert bars - 1 in {len(table.headings) for table in tables}
        assert "<img" not in text.replace("\\<", "")
        assert "mixlab sweep run" in text
        latex = latex_text(tables)
        assert latex.count(r"\begin{tabular}") == len(tables) == latex.count(r"\bottomrule")
        body = latex.replace(r"\&", "").replace(r"\%", "").replace(r"\_", "").replace(r"\$", "").replace(r"\#", "")
        assert "_" not in body.replace("usepackage", "")
        assert "#" not in body
