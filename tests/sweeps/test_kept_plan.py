"""The plan that a driver leaves to the next one: the same runs, for as long as nothing that it follows from changes."""

from __future__ import annotations

import json

import pytest

from sweeps import kept_plan
from sweeps.plan import Plan, plan
from tests.sweeps.helpers import TUNED, tiny

VARIED = '[vary]\n"task.n_pairs" = [2, 4]\n' + TUNED
MATCHED = """
[match]
quantity = "parameters"
target = "narrow"
tolerance = 0.2
"""
ARMS = {"wide": {"free": False}, "solved": {"mixer": "linear_attention", "free": "model.d_model"}}


def everything(made: Plan) -> str:
    """All that a driver reads from a plan, as it reaches records, search and store."""
    arm_cells = [
        [
            arm_cell.name,
            arm_cell.factors,
            arm_cell.code,
            arm_cell.n_trials,
            [vars(arm_cell.trial(n, tried).identity) for n, tried in enumerate(arm_cell.trial_settings)],
            [vars(run.identity) for run in arm_cell.replicates({"train.lr": 0.01})],
        ]
        for arm_cell in made.arm_cells
    ]
    return json.dumps([arm_cells, made.match_json(), made.cells, made.patterns, made.count(), sorted(made.devices)])


@pytest.mark.parametrize("text", [VARIED, MATCHED], ids=["tuned", "matched"])
def test_a_kept_plan_is_the_plan(tmp_path, text):
    options = {"budget__tune_trials": 2} if text == VARIED else {"arms": ARMS}
    sweep = tiny(tmp_path, text, **options)
    made, basis = plan(sweep), kept_plan.basis(sweep, ())
    kept_plan.keep(tmp_path, basis, made, ("0",))
    found, gpus = kept_plan.read(tmp_path, sweep, basis)
    assert everything(found) == everything(made)
    assert gpus == ("0",)
    kept_plan.forget(tmp_path)
    assert kept_plan.read(tmp_path, sweep, basis) is None


def test_whatever_a_plan_follows_from_is_its_basis(tmp_path, monkeypatch):
    sweep = tiny(tmp_path)
    basis = kept_plan.basis(sweep, ())
    assert basis == kept_plan.basis(tiny(tmp_path), ())
    package, code = tmp_path / "site", tmp_path / "code"
    (package / "torch-99.dist-info").mkdir(parents=True)
    code.mkdir()
    (code / "__init__.py").touch()
    others = [kept_plan.basis(tiny(tmp_path, base__train__batch_size=4), ())]
    with monkeypatch.context() as patch:
        patch.syspath_prepend(package)
        others.append(kept_plan.basis(sweep, ()))
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "7")
        others.append(kept_plan.basis(sweep, ()))
    with monkeypatch.context() as patch:
        patch.setattr(kept_plan.mixers, "__file__", str(code / "__init__.py"))
        others.append(kept_plan.basis(sweep, ()))
        (code / "layer.py").write_text("width = 2", encoding="utf-8")
        others.append(kept_plan.basis(sweep, ()))
    assert len({basis, *others}) == 6


def test_code_from_elsewhere_may_change_unseen_and_its_plans_are_not_kept(tmp_path):
    sweep = tiny(tmp_path)
    made = plan(sweep)
    assert kept_plan.basis(sweep, ("plugin.py",)) == ""
    kept_plan.keep(tmp_path, "", made, ())
    vars(made.arm_cells[0])["code"] = {"of_a_package": "hash"}
    kept_plan.keep(tmp_path, "basis", made, ())
    assert not (tmp_path / kept_plan.FILE).exists()
