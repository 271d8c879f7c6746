from __future__ import annotations

import pytest
import torch

from experiments.backbone import Backbone, build_model
from experiments.config import ExperimentConfig, ModelConfig, StateConfig
from experiments.errors import UserError
from experiments.optimizer import build_optimizer, lr_at, parameter_options
from mixers.base import state_bytes, state_tensors
from mixers.fwpkm import FastWeightPKM

FW = "fwpkm(n_subkeys=4,top_k=2,key_dim=4,value_dim=6,chunk_size=4)"
MODEL = {
    "pattern": f"gated_deltanet,softmax(window=5) | {FW}@1 + pkm:channel(n_subkeys=4,top_k=2,key_dim=4)@0",
    "d_model": 16,
    "n_layers": 3,
    "mlp": "swiglu",
    "short_conv": 3,
}


def model(**changes) -> Backbone:
    torch.manual_seed(0)
    return Backbone(ModelConfig.parse({**MODEL, **changes}, "model"), vocab_size=11).double()


def test_every_slot_is_filled_as_the_pattern_says() -> None:
    m = model()
    assert {place: mixer.name for place, mixer in m.named_mixers().items()} == {
        "0.token": "gated_deltanet",
        "0.channel": "pkm",
        "1.memory": "fwpkm",
        "1.token": "softmax",
        "2.token": "gated_deltanet",
    }
    assert list(m.blocks[0].sublayers) == ["conv", "token", "channel"]
    assert list(m.blocks[1].sublayers) == ["memory", "conv", "token", "mlp"]
    assert "memory" not in m.blocks[1].norms  # it normalises its own input


@pytest.mark.parametrize("positions", ["none", "learned"])
@pytest.mark.parametrize("cut", [[1] * 13, [5, 0, 8]], ids=str)
def test_streaming_equals_one_call(positions: str, cut: list[int]) -> None:
    m = model(positions=positions)
    tokens = torch.randint(0, 11, (2, 13))
    whole = m(tokens, return_state=True)
    state, parts = None, []
    for part in tokens.split(cut, dim=1):
        out = m(part, state, return_state=True)
        state = out.state
        parts.append(out.hidden)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.hidden, rtol=1e-9, atol=1e-9)
    for got, want in zip(state_tensors(state), state_tensors(whole.state), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_causal_by_perturbation() -> None:
    m = model()
    tokens = torch.randint(0, 11, (1, 13))
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % 11
    before, after = m(tokens).hidden, m(changed).hidden
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_positions_beyond_the_table_are_refused() -> None:
    m = model(positions="learned", max_positions=8)
    with pytest.raises(UserError, match="max_positions=8"):
        m(torch.zeros(1, 9, dtype=torch.int64))


def experiment(**changes) -> ExperimentConfig:
    values = {
        "model": MODEL,
        "task": {"name": "mqar", "vocab_size": 32, "seq_len": 16, "n_pairs": 2},
        "train": {"max_steps": 10},
    }
    return ExperimentConfig.parse({**values, **changes}, "here")


def test_the_backbone_never_touches_a_mixers_initialisation() -> None:
    built = dict(build_model(experiment(), 32).named_mixers())["1.memory"]
    # The same draws: the layer's own initialisation is what the seeded generator gives at that point, unscaled.
    assert isinstance(built, FastWeightPKM)
    assert built.values.std().item() == pytest.approx(6**-0.5, rel=0.3)
    assert built.keys.abs().max() <= 4**-0.5
    assert torch.equal(built.q_norm.weight, torch.zeros_like(built.q_norm.weight))


def test_weights_depend_on_the_weights_seed_only_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = build_model(experiment(), 32), build_model(experiment(), 32)
    assert torch.equal(torch.get_rng_state(), before)
    other = build_model(experiment(seed=1), 32)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    softmax = build_model(experiment(model={**MODEL, "pattern": "softmax"}), 32)
    assert torch.equal(one.embedding.weight, softmax.embedding.weight)  # arms of a seed share the embedding


def test_state_scope_of_the_protocol_reaches_the_mixers_that_have_one() -> None:
    config = ModelConfig.parse(MODEL, "model")
    m = Backbone(config, 11, StateConfig(scope="shared"))
    assert {place: mixer.state_scope for place, mixer in m.named_mixers().items()}["1.memory"] == "shared"
    explicit = ModelConfig.parse({**MODEL, "pattern": "fwpkm(scope=sequence)"}, "model")
    with pytest.raises(UserError, match=r"contradicts state.scope=shared"):
        Backbone(explicit, 11, StateConfig(scope="shared"))


def test_decay_groups() -> None:
    m = model(pattern=f"softmax | {FW[:-1]},initial_memory=learned)@1")
    decayed = {name for name, p in m.named_parameters() if parameter_options(m, name, p).weight_decay}
    assert not any("norm" in name or name.endswith("bias") or "embedding" in name for name in decayed)
    assert "blocks.1.sublayers.memory.q_proj.weight" in decayed
    assert not {"blocks.1.sublayers.memory.keys", "blocks.1.sublayers.memory.values"} & decayed
    optimizer = build_optimizer(m, experiment().train)
    grouped = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(grouped) == len(list(m.parameters()))
    for name, p in m.named_parameters():
        assert grouped[id(p)] == (0.1 if name in decayed else 0.0)


def test_value_learning_rate_scale_reaches_the_optimizer() -> None:
    m = model(pattern="pkm(n_subkeys=4,top_k=2,value_lr_scale=4.0)")
    scales = {group["lr_scale"] for group in build_optimizer(m, experiment().train).param_groups}
    assert scales == {1.0, 4.0}


def test_schedule() -> None:
    train = experiment(train={"max_steps": 100, "lr": 1.0, "warmup_steps": 10, "min_lr_ratio": 0.1}).train
    lrs = [lr_at(step, 100, train) for step in range(100)]
    assert lrs[0] == pytest.approx(0.1)
    assert lrs[9] == lrs[10] == pytest.approx(1.0)
    assert lrs[55] == pytest.approx(0.55)
    assert lrs[99] == pytest.approx(0.1, abs=0.001)
    constant = train.model_copy(update={"schedule": "constant"})
    assert lr_at(99, 100, constant) == 1.0


def test_sizes_of_state_follow_the_real_tensors() -> None:
    m = model(pattern="softmax", mlp="none", short_conv=0).float()
    states = [state_bytes(m(torch.zeros(1, n, dtype=torch.int64), return_state=True).state.blocks) for n in (10, 20)]
    keys_and_values = 3 * 2 * 16 * 4  # layers, K and V, width, bytes of float32
    assert states[1] - states[0] == 10 * keys_and_values
