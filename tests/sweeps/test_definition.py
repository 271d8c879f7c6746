"""Sweep files: what is read, and the one line that each mistake gets."""

from __future__ import annotations

import pytest

from experiments.errors import UserError
from sweeps.definition import TUNING_SEED, load_sweep
from tests.sweeps.helpers import TUNED, tiny, tuned, write_sweep


def refused(path, overrides=None) -> str:
    with pytest.raises(UserError) as caught:
        load_sweep(path, overrides or {})
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "FILE")


def test_a_sweep_is_read(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path, '[vary]\n"task.n_pairs" = [2, 4]\n'))
    assert sweep.seeds == (0, 1)
    assert sweep.arms["wide"] == {"mixer": "softmax", "model": {"d_model": 32}}
    assert sweep.vary == {"task.n_pairs": (2, 4)}
    assert sweep.search.sampler == "spread"


def test_paths_may_be_written_without_quotes(tmp_path):
    text = "[vary]\ntask.n_pairs = [2, 4]\n[tune]\ntrain.lr = { log_uniform = [1e-4, 1e-2] }\n"
    sweep = load_sweep(write_sweep(tmp_path, text), {"budget.tune_trials": 2})
    assert list(sweep.vary) == ["task.n_pairs"]
    assert sweep.tune["train.lr"].bounds == (1e-4, 1e-2)


def test_overrides_replace_values_lists_and_spaces(tmp_path):
    path = write_sweep(tmp_path, '[vary]\n"task.n_pairs" = [2, 4]\n' + TUNED)
    overrides = {
        "seeds": [7],
        "budget.tune_trials": 3,
        "base.train.batch_size": 16,
        "vary.task.n_pairs": [8],
        "tune.train.lr": {"choice": [0.1, 0.2]},
        "arms.wide.model.d_model": 64,
    }
    sweep = load_sweep(path, overrides)
    assert sweep.seeds == (7,)
    assert sweep.base["train"]["batch_size"] == 16
    assert sweep.vary == {"task.n_pairs": (8,)}
    assert sweep.tune["train.lr"].choice == (0.1, 0.2)
    assert sweep.arms["wide"]["model"] == {"d_model": 64}


def test_one_limit_on_the_command_line_replaces_the_other_of_the_file(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path), {"budget.max_tokens": 5000})
    assert (sweep.budget.max_tokens, sweep.budget.max_steps) == (5000, None)


def test_the_experiment_lies_beside_the_sweep_file_and_below_base(tmp_path):
    (tmp_path / "shared.toml").write_text('[task]\nname = "mqar"\nn_pairs = 9\n[train]\nlr = 0.5\n', encoding="utf-8")
    path = write_sweep(tmp_path, **{"seeds = [0, 1]": 'seeds = [0, 1]\nexperiment = "shared.toml"'})
    sweep = load_sweep(path)
    assert sweep.base["task"]["n_pairs"] == 4
    assert sweep.base["train"] == {"lr": 0.5, "batch_size": 8}


def test_an_unknown_experiment(tmp_path):
    path = write_sweep(tmp_path, **{"seeds = [0, 1]": 'seeds = [0, 1]\nexperiment = "no_such_recipe"'})
    assert refused(path).startswith("FILE: experiment: ")


def test_a_file_that_is_not_there():
    assert refused("nowhere/x.toml") == "FILE: no such file"


def test_an_unknown_shipped_name():
    assert refused("no_such_sweep").startswith("FILE: neither a sweep file nor a shipped sweep")


MISTAKES = [
    ({"name": "../up"}, "FILE: name: names a folder: letters, digits, '.', '_' and '-'"),
    ({"name": "artifacts"}, "FILE: name: 'artifacts' is a folder of the tracking store"),
    ({"qestion": "x"}, "FILE: qestion: unknown key; did you mean 'question'?"),
    ({"seeds": []}, "FILE: seeds: at least one seed is needed"),
    ({"seeds": [1, 1]}, "FILE: seeds: 1 is listed twice"),
    ({"seeds": [-1]}, "FILE: seeds: seeds are not negative, got -1"),
    ({"seeds": [TUNING_SEED]}, f"FILE: seeds: {TUNING_SEED} is the seed of the tuning runs"),
    ({"seeds": ["0"]}, "FILE: seeds.0: input should be a valid integer, got '0'"),
    ({"metric.select": "report/accuracy"}, "FILE: metric: select and report are both 'report/accuracy'"),
    (
        {"metric.select": "train/loss"},
        "FILE: metric: select must name a metric of its own split, 'select/...', got 'train/l",
    ),
    (
        {"metric.report": "report/"},
        "FILE: metric: report must name a metric of its own split, 'report/...', got 'report/'",
    ),
    ({"metric.direction": "max"}, "FILE: metric.direction: input should be 'maximize' or 'minimize', got 'max'"),
    ({"budget": {"max_tokens": 5, "max_steps": 5}}, "FILE: budget: give exactly one of max_tokens and max_steps"),
    ({"budget.max_steps": 0}, "FILE: budget.max_steps: input should be greater than 0, got 0"),
    ({"budget.tune_trials": 3}, "FILE: budget.tune_trials = 3, but there is no [tune] to search"),
    (
        {"tune.train.lr": {"log_uniform": [1e-4, 1e-2]}},
        "FILE: budget.tune_trials must be at least 1 where there is a [tune]",
    ),
    (
        {"tune.train.lr": {"loguniform": [1, 2]}},
        "FILE: tune.train.lr.loguniform: unknown key; did you mean 'log_uniform'",
    ),
    (
        {"tune.train.lr": {"log_uniform": [2, 1]}},
        "FILE: tune.train.lr: log_uniform is [low, high] with low < high, got [2.0",
    ),
    ({"tune.train.lr": {"log_uniform": [0, 1]}}, "FILE: tune.train.lr: log_uniform needs low > 0, got 0.0"),
    ({"tune.train.lr": {"choice": []}}, "FILE: tune.train.lr: choice needs at least one value"),
    ({"tune.train.lr": {"choice": [1, 1.0]}}, "FILE: tune.train.lr: choice lists a value twice"),
    (
        {"tune.train.lr": {"choice": [1], "uniform": [0, 1]}},
        "FILE: tune.train.lr: give exactly one of log_uniform, uniform",
    ),
    ({"vary.task.n_pairs": []}, "FILE: vary: task.n_pairs is an empty list"),
    ({"vary.task.n_pairs": 8}, "FILE: vary: task.n_pairs takes a list of values, got 8"),
    ({"vary.task.n_pairs": [8, 8]}, "FILE: vary: task.n_pairs lists 8 twice"),
    ({"vary.model.d_model": [8]}, "FILE: vary: model.d_model would overrule model.d_model of [arms.wide]"),
    ({"vary.seed": [8]}, "FILE: vary: seed can't be set here: the list `seeds` sets it"),
    ({"base.train.max_steps": 8}, "FILE: base: train.max_steps can't be set here: [budget] sets it"),
    ({"arms.wide.train.max_tokens": 8}, "FILE: arms.wide: train.max_tokens can't be set here: [budget] sets it"),
    ({"arms.wide.model.pattern": "softmax"}, "FILE: arms: wide: `mixer` is short for model.pattern; give one of them"),
    ({"arms.wide.mixer": 3}, "FILE: arms: wide: mixer is a pattern in quotes, got 3"),
    ({"search.sampler": "spred"}, "FILE: search.sampler: input should be 'spread', 'random', "),
]


@pytest.mark.parametrize(("overrides", "expected"), MISTAKES, ids=[repr(case[0]) for case in MISTAKES])
def test_a_mistake_is_one_line_with_its_place(tmp_path, overrides, expected):
    assert refused(write_sweep(tmp_path), overrides).startswith(expected)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("task.n_pairs", "tune: task.n_pairs is part of the question"),
        ("model.pattern", "tune: model.pattern is part of the question"),
        ("model.d_model", "tune: model.d_model would overrule model.d_model of [arms.wide]"),
        ("train.max_steps", "tune: train.max_steps can't be set here"),
    ],
)
def test_what_can_not_be_tuned(tmp_path, path, expected):
    overrides = {f"tune.{path}": {"choice": [2, 4]}, "budget.tune_trials": 2}
    assert expected in refused(write_sweep(tmp_path), overrides)


def test_vary_and_tune_of_one_setting(tmp_path):
    overrides = {"tune.train.lr": {"choice": [0.1, 0.2]}, "vary.train.lr": [0.1], "budget.tune_trials": 2}
    assert "vary: train.lr would overrule train.lr of [tune]" in refused(write_sweep(tmp_path), overrides)


def test_no_arms(tmp_path):
    content = write_sweep(tmp_path).read_text().partition("[arms.narrow]")[0]
    path = tmp_path / "empty.toml"
    path.write_text(content + "[arms]\n", encoding="utf-8")
    assert refused(path) == 'FILE: arms: nothing to compare: add [arms.NAME] with mixer = "..."'


@pytest.mark.parametrize("name", ["a.b", "a|b", "-a", ""])
def test_arm_names_that_would_not_survive_labels(tmp_path, name):
    path = write_sweep(tmp_path, f'[arms."{name}"]\nmixer = "softmax"\n')
    assert "arms: " in refused(path)


def test_a_sweep_without_overrides_is_what_the_file_says(tmp_path):
    assert tiny(tmp_path) == load_sweep(write_sweep(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"search__sampler": "tpee"}, "search.sampler: input should be"),
        (
            {"search": {"sampler": "tpe", "options": {"n_startup": 3}}},
            "options of tpe: n_startup: unknown key; did you",
        ),
        ({"search__options": {"n": 3}}, "options of spread: n: unknown key"),
        ({"search__sampler": "cmaes"}, "cmaes needs at least two settings"),
        ({"search": {"sampler": "nsgaii", "options": {"population_size": 4}}}, "must be below budget.tune_trials = 4"),
        (
            {
                "search__sampler": "grid",
                "tune__train__schedule": {"choice": ["cosine", "constant"]},
            },
            "a grid of 2 of train.lr x 2 of train.schedule has 4 points, not budget.tune_trials = 5",
        ),
        ({"search": {"sampler": "grid", "options": {"points": {"lr": 4}}}}, "points of lr: not a continuous setting"),
        ({"search__pruner": "medium"}, "search.pruner: input should be"),
        ({"search__pruner_options": {"n_startup_trials": 1}}, "options of none: n_startup_trials: unknown key"),
    ],
)
def test_bad_searches_are_one_line(tmp_path, overrides, expected):
    n_trials = 5 if overrides.get("search__sampler") == "grid" else 4
    with pytest.raises(UserError) as caught:
        tuned(tmp_path, n_trials, **overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
