"""[match]: counted costs are the measured ones, and every arm comes as near to the target as it can."""

from __future__ import annotations

import json
import random

import pytest
import torch
from click.testing import CliRunner

from experiments import counted
from experiments.backbone import build_model
from experiments.config import ExperimentConfig, merged
from experiments.cost import measure_cost
from experiments.counted import counted_cost
from experiments.device import Compute
from experiments.errors import UserError
from sweeps.cli import commands
from sweeps.definition import load_sweep
from sweeps.match import nearest_values
from sweeps.plan import plan
from tests.sweeps.helpers import BASE, tiny

FLOAT32 = Compute(torch.device("cpu"), None)
MATCH = """
[match]
quantity = "state_bytes"
target = "gdn"
tolerance = 0.1
[arms.gdn]
mixer = "gated_deltanet(n_heads=2,key_dim=8)"
[arms.window]
mixer = "softmax(n_heads=2,head_dim=6)"
free = "window"
[arms.lin]
mixer = "linear_attention"
free = { name = "key_dim", multiple_of = 2 }
"""
ARMS = BASE[: BASE.index("[arms.narrow]")]


def experiment(pattern: str, n_layers: int = 1, **model) -> ExperimentConfig:
    task = {"name": "mqar", "vocab_size": 64, "seq_len": 38, "n_pairs": 3, "n_train": 8, "n_select": 4, "n_report": 4}
    values = {
        "model": {"pattern": pattern, "n_layers": n_layers, "d_model": 24, **model},
        "task": task,
        "train": {"max_steps": 1, "device": "cpu"},
    }
    return ExperimentConfig.parse(values, "test")


@pytest.mark.parametrize("computed", [True, False])
@pytest.mark.parametrize(
    ("pattern", "n_layers", "model"),
    [
        ("softmax(window=7)", 1, {}),
        ("softmax*2,linear_attention(key_dim=5) | fwpkm(n_subkeys=5,top_k=3,chunk_size=16)@1", 3, {"short_conv": 3}),
        ("fwpkm(n_subkeys=7,top_k=2,chunk_size=38)", 2, {"mlp": "swiglu", "tie_embeddings": False}),
        ("gated_deltanet(key_dim=3),none | pkm(n_subkeys=4,top_k=2)@1", 2, {"mlp": "swiglu"}),
    ],
)
def test_counted_is_what_a_run_measures(monkeypatch, pattern, n_layers, model, computed):
    monkeypatch.setattr(counted, "MAX_COMPUTED", 1e12 if computed else 0)
    counted._layer_state.cache_clear()
    counted._state.cache_clear()
    config = experiment(pattern, n_layers, **model)
    built = build_model(config, 64)
    measured = measure_cost(built, 38, FLOAT32)
    assert counted_cost(config, "state_bytes").total == measured["state_bytes"] > 0
    assert counted_cost(config, "parameters").total == measured["params"] > 0
    assert counted_cost(config, "flops_per_token").total == measured["flops_per_token"] > 0
    own = sum(p.numel() for mixer in built.named_mixers().values() for p in mixer.parameters())
    assert counted_cost(config, "parameters").mixers == own < measured["params"]


def test_counting_leaves_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for quantity in ("state_bytes", "parameters", "flops_per_token"):
        counted_cost(experiment("fwpkm(n_subkeys=9,top_k=3)"), quantity)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", range(60))
def test_the_nearest_values_are_those_of_a_full_search(seed):
    rng = random.Random(seed)
    limit, step = rng.choice([1, 7, 100, 999]), rng.choice([1, 1, 3, 8])
    cost = [0.0]
    for _ in range(limit):
        cost.append(cost[-1] + rng.random() ** 4)
    usable = [n for n in range(step, limit + 1, step) if rng.random() < rng.choice([0.3, 1.0])]
    target = cost[-1] * rng.choice([0.0, 0.1, 0.5, 0.9, 1.2]) + 1e-9
    below = [n for n in usable if cost[n] < target]
    above = [n for n in usable if cost[n] >= target]
    found = nearest_values(lambda n: cost[n] if n in usable else None, target, step, limit)
    assert found == below[-1:] + above[:1]


def test_a_cost_that_stops_growing_ends_the_search():
    asked = []

    def cost_of(n: int) -> float:
        asked.append(n)
        return float(min(n, 48))

    assert cost_of(nearest_values(cost_of, 1000.0, 1, 2**20)[0]) == 48
    assert len(asked) < 20


def matched(tmp_path, text: str = MATCH, **overrides):
    (tmp_path / "tiny.toml").write_text(ARMS + text, encoding="utf-8")
    return load_sweep(tmp_path / "tiny.toml", merged({}, {k.replace("__", "."): v for k, v in overrides.items()}))


def test_arms_are_solved_to_the_cost_of_another(tmp_path):
    planned = plan(matched(tmp_path))
    gdn, window, lin = planned.arm_cells
    config = gdn.replicates({})[0].config
    target = measure_cost(build_model(config, 64), 32, FLOAT32)["state_bytes"]
    for arm_cell in (window, lin):
        measured = measure_cost(build_model(arm_cell.replicates({})[0].config, 64), 32, FLOAT32)["state_bytes"]
        assert arm_cell.matched.reached == measured
        assert arm_cell.matched.target == target
        assert abs(measured / target - 1) < 0.1
    assert lin.matched.value % 2 == 0
    assert window.pattern == f"softmax(head_dim=6,n_heads=2,window={window.matched.value})"
    assert window.replicates({})[0].config.model.pattern == window.pattern  # and with it the key
    assert planned.match_json()["reached"]["window | all"]["value"] == window.matched.value
    assert plan(matched(tmp_path)) == planned


def test_a_number_as_target_and_the_mixers_alone(tmp_path):
    sweep = matched(
        tmp_path,
        match={"quantity": "parameters", "target": 3000, "of": "mixers"},
        arms__gdn__free="model.d_model",
        arms__window={"mixer": "softmax", "free": "head_dim"},
    )
    for arm_cell in plan(sweep).arm_cells:
        model = build_model(arm_cell.replicates({})[0].config, 64)
        own = sum(p.numel() for mixer in model.named_mixers().values() for p in mixer.parameters())
        assert own == arm_cell.matched.reached
        assert abs(own / 3000 - 1) < 0.1


def test_the_target_is_that_of_the_same_cell(tmp_path):
    sweep = matched(tmp_path, MATCH + '[vary]\n"model.short_conv" = [0, 3]\n')
    targets = {arm_cell.cell: arm_cell.matched.target for arm_cell in plan(sweep).arm_cells}
    assert targets["short_conv=3"] == targets["short_conv=0"] + 2 * 16 * 4


def test_an_arm_left_out(tmp_path):
    planned = plan(matched(tmp_path, arms__full={"mixer": "softmax", "free": False}))
    assert planned.arm_cells[-1].matched is None
    assert "full | all" not in planned.match_json()["reached"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"match__tolerance": 0.001},
            "cell all, arm window: match: state_bytes of the model can't come within 0.001 of 1,088: "
            "window=12 gives 1,064 (-2.2 %), window=13 gives 1,160 (+6.6 %); free another dimension",
        ),
        ({"match__target": 100_000, "arms__gdn__free": "value_dim"}, "arm window: match: state_bytes of the model"),
        ({"arms__third__mixer": "softmax"}, "arm third: match: state_bytes of the model can't come within 0.1 of"),
        ({"arms__third": {"mixer": "softmax", "free": "n_slots"}}, "no mixer of the pattern has an option 'n_slots'"),
        ({"arms__lin__free": {"nam": "key_dim"}}, "arms.lin.free: nam: unknown key; did you mean 'name'"),
        ({"arms__lin__free": 3}, "arms.lin: write free ="),
        ({"arms__lin__mixer": "linear_attention(key_dim=4)"}, "key_dim is also given a value; give it in one place"),
        ({"arms__lin__free": "model.n_layer"}, "no whole-number setting 'n_layer'; did you mean 'n_layers'"),
        ({"arms__gdn__free": "value_dim"}, "match: target: arm 'gdn' can't have a free dimension"),
        ({"match__target": "gnd"}, "match: target: there is no arm 'gnd'; did you mean 'gdn'"),
        ({"match__target": 0}, "match.target: must be above 0, got 0"),
        ({"match__quantity": "state_byte"}, "match.quantity: input should be"),
        (
            {"tune": {"model.mlp": {"choice": ["none"]}}, "budget__tune_trials": 1},
            "tune: model.mlp would change the model",
        ),
        (
            {"vary__model__d_model": [8, 16], "arms__lin__free": "model.d_model"},
            "arms.lin: free: model.d_model is also given in [vary]",
        ),
        ({"arms__gdn__mixer": "pkm(n_subkeys=4,top_k=2)"}, "arm gdn: match: its state_bytes are 0"),
        (
            {"arms__lin": {"mixer": "softmax,linear_attention", "free": "n_heads", "model": {"n_layers": 2}}},
            "several mixers have an option 'n_heads': write linear_attention.n_heads or softmax.n_heads",
        ),
    ],
)
def test_bad_matches_are_one_line(tmp_path, overrides, expected):
    with pytest.raises(UserError) as caught:
        plan(matched(tmp_path, **overrides))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_free_without_match(tmp_path):
    with pytest.raises(UserError, match=r"arms\.narrow: free is for \[match\], and there is none"):
        plan(tiny(tmp_path, arms__narrow__free="window"))


def test_the_plan_prints_target_and_reached(tmp_path):
    matched(tmp_path)
    path = str(tmp_path / "tiny.toml")
    shown = CliRunner().invoke(commands[0], ["plan", path], env={"COLUMNS": "140"}).output
    reached = plan(matched(tmp_path)).arm_cells[1].matched
    assert "held equal: state_bytes of the model, within 0.1" in shown
    assert f"window={reached.value}" in shown
    assert f"{reached.reached:,.0f}" in shown
    told = json.loads(CliRunner().invoke(commands[0], ["plan", path, "--json"]).output)
    assert told["match"]["reached"]["window | all"]["reached"] == reached.reached
