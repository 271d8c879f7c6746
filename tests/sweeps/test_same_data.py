"""What arms share, proven by hashes of real trainings, and all that tuning tried, kept."""

from __future__ import annotations

import json
from dataclasses import replace

from analysis.comparison import as_json, compare
from analysis.runs import rows_from_records
from experiments.records import read_outcome, run_folder, write_outcome
from sweeps.executor import TARGET
from sweeps.status import sweep_status
from tests.sweeps.helpers import drive, tuned

CELLS = '[vary]\n"task.n_pairs" = [2, 3]\n'


def test_arms_of_a_cell_see_the_same_data_in_the_same_order(tmp_path):
    sweep = tuned(
        tmp_path,
        2,
        CELLS,
        arms__gdn__mixer="gated_deltanet(key_dim=4)",
        budget__max_steps=5,
        base__train__device="cpu",
    )
    result, _ = drive(sweep, tmp_path, target=TARGET)
    assert result.outcomes == {"finished": 3 * 2 * (2 + 2)}
    saved, rows = rows_from_records(tmp_path, "tiny")
    groups: dict[tuple, set] = {}
    for row in rows:
        groups.setdefault((row.cell, row.seed), set()).add((row.data_hash, row.order_hash))
    assert len(groups) == 2 * 3  # cells x (two seeds and that of the tuning)
    assert all(len(found) == 1 for found in groups.values()), groups
    data, order = zip(*(found.pop() for found in groups.values()), strict=True)
    assert len(set(data)) == len(set(order)) == 6
    assert all(data)
    assert all(order)
    lines = compare(saved, rows)
    assert not [note for line in lines for note in line.notes if "saw" in note]

    # every trial that was made, in compare and in status
    listed = json.loads(json.dumps(as_json(lines)))
    status = sweep_status(tmp_path, "tiny").to_json()
    for found in (listed, status["arm_cells"]):
        for line in found:
            trials = line["trials"]
            assert [trial["trial"] for trial in trials] == [0, 1]
            assert [trial["settings"] for trial in trials] == [{"train.lr": 1e-4}, {"train.lr": 1e-1}]
            for trial in trials:
                record = read_outcome(run_folder(tmp_path, "tiny", trial["key"]))
                assert trial["value"] == record.metrics["select/accuracy"]
                assert trial["outcome"] == "finished"

    # and a run of other data is told
    row = next(row for row in rows if (row.arm, row.cell, row.seed) == ("gdn", "n_pairs=3", 1))
    folder = run_folder(tmp_path, "tiny", row.key)
    write_outcome(folder, replace(read_outcome(folder), order_hash="other"))
    notes = {(line.arm, line.cell): line.notes for line in compare(*rows_from_records(tmp_path, "tiny"))}
    told = "arms of this cell saw another order of the data (seeds 1)"
    assert {place for place, found in notes.items() if told in found} == {
        (arm, "n_pairs=3") for arm in ("narrow", "wide", "gdn")
    }
