"""Plans: counts, labels, keys, and what is refused before anything is created."""

from __future__ import annotations

import pytest

from experiments.errors import UserError
from sweeps.definition import TUNING_SEED, load_sweep
from sweeps.plan import cell_label, plan
from tests.sweeps.helpers import tiny, tuned, write_sweep

CELLS = '[vary]\n"task.n_pairs" = [2, 4, 8]\n'


def test_count_of_a_tuned_sweep(tmp_path):
    planned = plan(tuned(tmp_path, 12, CELLS, seeds=[0, 1, 2, 3, 4]))
    assert planned.count() == "2 arms x 3 cells x (12 tuning + 5 seeds) = 102 runs"
    assert planned.n_runs == 102


def test_count_without_tuning_and_cells(tmp_path):
    assert plan(tiny(tmp_path, seeds=[3])).count() == "2 arms x 1 cell x 1 seed = 2 runs"


def test_a_small_discrete_space_is_not_tried_twice(tmp_path):
    sweep = tiny(tmp_path, "[tune]\n'train.lr' = { choice = [1e-3, 1e-2] }\n", budget__tune_trials=12)
    assert plan(sweep).count() == "2 arms x 1 cell x (2 tuning + 2 seeds) = 8 runs"


def test_cells_are_crossed_and_labelled(tmp_path):
    planned = plan(tiny(tmp_path, '[vary]\n"task.n_pairs" = [2, 4]\n"state.carry" = ["none"]\n'))
    assert list(planned.cells) == ["n_pairs=2, carry=none", "n_pairs=4, carry=none"]
    assert planned.cells["n_pairs=2, carry=none"] == {"task.n_pairs": 2, "state.carry": "none"}
    assert list(planned.patterns) == ["narrow", "wide"]


@pytest.mark.parametrize(
    ("factors", "label"),
    [
        ({}, "all"),
        ({"task.n_pairs": 8}, "n_pairs=8"),
        ({"train.lr": 3e-05, "train.compile": True}, "lr=3e-05, compile=true"),
        ({"task.size": 1, "model.size": 2}, "task.size=1, model.size=2"),
        ({"task.parts": ({"a": 1}, None)}, 'parts=[{"a":1},null]'),
    ],
)
def test_cell_labels(factors, label):
    assert cell_label(factors) == label


def test_arms_share_seeds_and_tuning_has_one_of_its_own(tmp_path):
    narrow, wide = plan(tuned(tmp_path)).arm_cells
    seeds = [run.identity.seed for run in narrow.replicates({"train.lr": 0.01})]
    assert seeds == [run.identity.seed for run in wide.replicates({"train.lr": 0.02})] == [0, 1]
    trial = narrow.trial(0, narrow.trial_settings[0])
    assert trial.identity.seed == trial.config.seed == TUNING_SEED
    assert (trial.identity.role, narrow.replicates({})[0].identity.role) == ("tuning", "replicate")


def test_every_run_has_a_key_of_its_own(tmp_path):
    arm_cells = plan(tuned(tmp_path, 3, CELLS)).arm_cells
    runs = [arm_cell.trial(i, s) for arm_cell in arm_cells for i, s in enumerate(arm_cell.trial_settings)]
    runs += [run for arm_cell in arm_cells for run in arm_cell.replicates({"train.lr": 0.5})]
    assert len({run.key for run in runs}) == len(runs) == 6 * (3 + 2)
    assert all(run.key == run.config.key() for run in runs)


def test_the_budget_replaces_the_limit_of_the_experiment(tmp_path):
    (tmp_path / "shared.toml").write_text("[train]\nmax_tokens = 7\n", encoding="utf-8")
    path = write_sweep(tmp_path, **{"seeds = [0, 1]": 'seeds = [0, 1]\nexperiment = "shared.toml"'})
    config = plan(load_sweep(path)).arm_cells[0].replicates({})[0].config
    assert (config.train.max_steps, config.train.max_tokens) == (2, None)


def test_keys_do_not_hang_on_how_the_file_is_written(tmp_path):
    keys = [run.key for arm_cell in plan(tiny(tmp_path)).arm_cells for run in arm_cell.replicates({})]
    reordered = tiny(tmp_path, seeds=[1, 0], question="Other words", arms__wide__mixer=" softmax ")
    assert {run.key for arm_cell in plan(reordered).arm_cells for run in arm_cell.replicates({})} == set(keys)
    released = plan(tiny(tmp_path)).arm_cells[0].replicates({})[0].config.key(code={})
    assert released == PINNED_KEY, "keys changed: finished runs of existing sweeps would all be run again"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"base__task__n_pair": 3},
            "sweep tiny, arm narrow, cell all: task.n_pair: unknown key; did you mean 'n_pairs'",
        ),
        (
            {"base__train__batch_size": 0},
            "arm narrow, cell all: train.batch_size: input should be greater than 0, got 0",
        ),
        ({"arms__wide__modl__d_model": 3}, "sweep tiny, arm wide, cell all: modl: unknown key; did you mean 'model'?"),
        ({"arms__wide__mixer": "softmux"}, "unknown mixer 'softmux'; did you mean 'softmax'?"),
        ({"arms__wide__mixer": "softmax("}, "sweep tiny, arm wide: "),
        ({"arms__third__model__d_model": 8}, "sweep tiny, arm third: no mixer: give mixer ="),
        ({"arms__twin__mixer": "softmax"}, "sweep tiny: arms 'narrow' and 'twin' are the same run in cell all"),
        ({"vary__task__n_pairs": [2, 99]}, "sweep tiny, arm narrow, cell n_pairs=99: task"),
        (
            {"vary__task__filler": ["zeros", "zeroes"]},
            "cell filler=zeroes: task.filler: input should be 'zeros' or 'random'",
        ),
    ],
)
def test_bad_settings_are_one_line(tmp_path, overrides, expected):
    with pytest.raises(UserError) as caught:
        plan(tiny(tmp_path, **overrides))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sampler", ["spread", "tpe"])
def test_a_setting_that_only_tuning_makes_bad_is_found(tmp_path, sampler):
    text = f"[tune]\n'train.beta1' = {{ uniform = [0.5, 1.5] }}\n[search]\nsampler = '{sampler}'\n"
    with pytest.raises(UserError, match=r"train\.beta1: input should be less than 1, got 1\."):
        plan(tiny(tmp_path, text, budget__tune_trials=3))


def test_two_cells_of_one_label(tmp_path):
    with pytest.raises(UserError, match="two cells are both called 'filler=1'"):
        plan(tiny(tmp_path, '[vary]\n"task.filler" = [1, "1"]\n'))


PINNED_KEY = "711c63381b9f2082"
