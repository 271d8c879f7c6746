from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.config import ExperimentConfig
from experiments.errors import UserError
from experiments.pattern import MixerSpec, Pattern, Placement, parse_pattern


def test_the_whole_grammar() -> None:
    pattern = parse_pattern("gated_deltanet*3,softmax(window=64) | pkm@2 + fwpkm:channel(lr=1e-2, scope=shared)@10,1")
    gdn, swa = MixerSpec("gated_deltanet"), MixerSpec("softmax", (("window", 64),))
    assert pattern.token == (gdn, gdn, gdn, swa)
    assert pattern.placements == (
        Placement(MixerSpec("pkm"), None, (2,)),
        Placement(MixerSpec("fwpkm", (("lr", 0.01), ("scope", "shared"))), "channel", (1, 10)),
    )
    assert str(pattern) == ("gated_deltanet*3,softmax(window=64) | pkm@2 + fwpkm:channel(lr=0.01,scope=shared)@1,10")
    assert pattern.mixer_names() == ["fwpkm", "gated_deltanet", "pkm", "softmax"]


def test_empty_token_slot_values_and_colon_names() -> None:
    assert parse_pattern("none | fwpkm@0").token == (None,)
    spec = parse_pattern('a(x=true,y=none,z="two words",w=-3)').token[0]
    assert spec == MixerSpec("a", (("w", -3), ("x", True), ("y", None), ("z", "two words")))
    placed = parse_pattern("fla:rwkv7 | fla:gla:channel@1").placements[0]
    assert (placed.mixer.name, placed.slot) == ("fla:gla", "channel")


values = st.one_of(
    st.booleans(),
    st.none(),
    st.integers(-999, 999),
    st.floats(0.001, 99.0),
    st.from_regex(r"[a-z ]{1,8}", fullmatch=True),
)
options = st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), values, max_size=3)
specs = st.builds(
    lambda name, o: MixerSpec(name, tuple(sorted(o.items()))),
    st.from_regex(r"[a-z]{2,6}", fullmatch=True).filter(lambda name: name != "none"),
    options,
)
placements = st.builds(
    Placement,
    specs,
    st.sampled_from([None, "token", "memory", "channel"]),
    st.sets(st.integers(0, 30), min_size=1, max_size=3).map(lambda layers: tuple(sorted(layers))),
)


@given(st.lists(st.one_of(specs, st.none()), min_size=1, max_size=4), st.lists(placements, max_size=3))
def test_canonical_form_parses_to_itself(token: list, placed: list) -> None:
    pattern = Pattern(tuple(token), tuple(placed))
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the name of a mixer, but the pattern ends"),
        ("softmax,", "expected the name of a mixer"),
        ("softmax softmax", "at character 9: unexpected 'softmax'"),
        ("softmax | fwpkm", "names its layers, for example fwpkm@0"),
        ("softmax(window)", "option 'window' needs a value"),
        ("softmax(window=1,window=2)", "option 'window' is given twice"),
        ("softmax(window=64", "pattern ends"),
        ("softmax*0", "at least 1"),
        ("softmax | pkm@1,1", "repeat"),
        ("softmax & pkm", "unexpected '&'"),
        ("softmax | pkm@x", "expected a layer number, got 'x'"),
        ("softmax*1.5", "expected a repeat count, got '1.5'"),
    ],
)
def test_mistakes_show_where_they_stand(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_pattern(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BASE = {"task": {"name": "mqar", "vocab_size": 32, "seq_len": 16, "n_pairs": 2}, "train": {"max_steps": 1}}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"pattern": "sofmax"}, "unknown mixer 'sofmax'; did you mean 'softmax'?"),
        ({"pattern": "softmax | fwpkm@7"}, "there is no layer 7; n_layers=2, counted from 0"),
        ({"pattern": "softmax | fwpkm:token@1"}, "the token slot of layer 1 already holds softmax"),
        ({"pattern": "softmax*3"}, "names 3 token mixers for n_layers=2"),
        ({"pattern": "softmax(n_heads=3)"}, "n_heads"),
        ({"pattern": "softmax(windw=3)"}, "windw: unknown key; did you mean 'window'?"),
        ({"pattern": "softmax(d_model=32)"}, "differs from model.d_model=64"),
    ],
)
def test_models_that_can_not_be_built(model: dict, message: str) -> None:
    from experiments.backbone import validate_model

    config = ExperimentConfig.parse({**BASE, "model": model}, "here")
    with pytest.raises(UserError) as caught:
        validate_model(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"max_steps": 1, "lrr": 1.0}}, "here: train.lrr: unknown key; did you mean 'lr'?"),
        ({"train": {"max_steps": "1"}}, "here: train.max_steps: input should be a valid integer, got '1'"),
        ({"train": {}}, "exactly one of max_tokens and max_steps"),
        ({"task": {"name": "mqar", "n_pair": 2}}, "here: task.n_pair: unknown key; did you mean"),
        ({"task": {"name": "mqr"}}, "here: task.name: unknown 'mqr'; did you mean 'mqar'?"),
        (
            {"train": {"max_steps": 9, "eval_every": 3, "stop": {"metric": "report/accuracy", "threshold": 1.0}}},
            "select",
        ),
        ({"train": {"max_steps": 9, "stop": {"metric": "select/accuracy", "threshold": 1.0}}}, "eval_every"),
        (
            {"task": {"name": "text", "document_byte": 2}},
            "here: task.document_byte: unknown key; did you mean 'document_bytes'",
        ),
        ({"task": {"name": "mqar", "seq_len": 15}}, "here: task: "),
        ({"sed": 1}, "here: sed: unknown key; did you mean"),
    ],
)
def test_config_mistakes_are_one_clear_line(change: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        ExperimentConfig.parse({**BASE, "model": {"pattern": "softmax"}, **change}, "here")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_key_is_a_hash_of_the_resolved_config() -> None:
    values = {**BASE, "model": {"pattern": "softmax"}}
    config = ExperimentConfig.parse(values, "here")
    explicit = ExperimentConfig.parse(config.resolved(), "here")
    assert config.key() == explicit.key()
    other = ExperimentConfig.parse({**values, "seed": 1}, "here")
    assert other.key() != config.key()
    assert len({config.seed_for(what) for what in ("weights", "data", "order")}) == 3
