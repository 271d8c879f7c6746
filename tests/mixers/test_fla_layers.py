"""fla's layers as mixers: names, options and the adapter on the CPU; every layer on CUDA."""

import importlib.util
import json

import pytest
import torch
from click.testing import CliRunner

from experiments.backbone import build_model, validate_model
from experiments.config import ExperimentConfig
from experiments.cost import measure_cost
from experiments.device import Compute
from mixers import fla_layers, registry
from mixers.base import state_bytes, state_tensors
from mixers.cli import mixers_command
from mixers.errors import UserError
from mixers.fla_layers.catalog import arguments, package_folder, sources
from mixers.fla_layers.facts import FACTS, NOT_MIXERS
from mixers.fla_layers.options import type_of
from mixers.implementations import FLA_MISSING, gated_backward_fault
from tests.mixers.fla_stand_in import stand_in

FOLDER = package_folder()
pytestmark = pytest.mark.skipif(FOLDER is None, reason="flash-linear-attention is not installed")
D, T = 64, 70
BF16 = 2e-2  # relative norm of the difference between two ways in bfloat16
HEADS = {"n_heads": 2}
# Options beside d_model=64 that keep heads at widths which kernels take; a layer that isn't named takes its defaults.
OPTIONS = {
    **dict.fromkeys(("abc", "attn", "bitattn", "delta_net", "deltaformer", "forgetting_attn", "gla", "gsa"), HEADS),
    **dict.fromkeys(("linear_attn", "mla", "moba", "multiscale_retention", "parallax", "path_attn", "raven"), HEADS),
    **dict.fromkeys(("rwkv6", "stickbreaking_attn", "wall_attn", "yoco_gated_retention"), HEADS),
    **{name: {"n_heads": 2, "head_dim": 32} for name in ("comba", "cyfa", "gated_deltanet", "gated_deltaproduct")},
    **{name: {"n_heads": 2, "head_dim": 32} for name in ("gdn2", "kda", "mesa_net", "mom", "momentum_deltanet")},
    **{name: {"n_heads": 2, "head_dim": 32} for name in ("precond_gated_deltanet", "precond_kda")},
    **{name: {"n_heads": 2, "num_key_value_heads": 2} for name in ("based", "rebased")},
    "gla": {"n_heads": 2, "use_short_conv": True, "expand_k": 1.0},
    "hgrn2": {"expand_ratio": 32},
    "lightnet": {"expand_ratio": 32},
    "log_linear_mamba2": {"n_heads": 4, "head_dim": 32},
    "mamba": {"intermediate_size": 128},
    "mamba2": {"head_dim": 32},
    "mamba3": {"head_dim": 32},
    "mla": {"n_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32},
    "mom": {"n_heads": 2, "head_dim": 32, "num_memories": 4},
    "nsa": {"n_heads": 32, "num_kv_heads": 2, "head_dim": 32},
    "raven": {"n_heads": 2, "num_slots": 32, "topk": 8},
    "rodimus_attention": {"expand_ratio": 32},
    "rodimus_sliding_window_shared_key_attention": {"n_heads": 2, "window_size": 32},
    "rwkv7": {"head_dim": 32},
}
# Why the outputs of single tokens behind a prefill may be others than those of one call.
NOT_STREAMING = {
    "moba": "reads blocks in one call, and everything when it decodes, as its paper says",
}
# Layers that spoil the process: an illegal access, so that no test after them runs.
FAULTY = {"mesa_net": "fla 0.6's kernels reach outside their memory behind a second call (H100, triton 3.7.1)"}


def test_the_table_names_every_exported_layer():
    assert set(sources(FOLDER)) == set(FACTS) | set(NOT_MIXERS)
    assert not set(FACTS) & set(NOT_MIXERS)
    assert fla_layers.layer_names() == sorted("fla:" + name for name in FACTS)


def test_every_option_has_a_type():
    for name in FACTS:
        for argument in arguments(FOLDER, sources(FOLDER)[name]):
            if argument.annotation and argument.name not in ("hidden_size", "device", "dtype"):
                assert type_of(argument.annotation) is not type_of(""), (name, argument)


@pytest.mark.parametrize("name", sorted(FACTS))
def test_defaults_are_the_layers_own(name):
    cls = registry.get(f"fla:{name}")
    required = HEADS if name == "log_linear_mamba2" else {}
    config = cls.Config.parse({"d_model": 48, **required}, "here")
    own = {argument.name: argument.default for argument in arguments(FOLDER, sources(FOLDER)[name])}
    for field in set(cls.Config.model_fields) - {"d_model", "n_heads", *FACTS[name].defaults}:
        assert getattr(config, field) == own[field], field
    if "num_heads" in own and not required:
        assert config.n_heads == own["num_heads"]


@pytest.mark.skipif(bool(FLA_MISSING), reason=f"not installed: {', '.join(FLA_MISSING)}")
@pytest.mark.filterwarnings("ignore")
def test_the_files_read_say_what_the_library_says():
    import inspect

    import fla.layers

    for source in sources(FOLDER).values():
        parameters = inspect.signature(getattr(fla.layers, source.class_name)).parameters.values()
        named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        found = arguments(FOLDER, source)
        assert [argument.name for argument in found] == [parameter.name for parameter in named]
        for argument, parameter in zip(found, named, strict=True):
            if parameter.default is not parameter.empty:
                assert argument.default == parameter.default


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand": 1.0}, "here: expand: unknown key; did you mean 'expand_v' or 'expand_k'?"),
        ({"num_heads": 2}, "here: num_heads is called n_heads here"),
        ({"hidden_size": 2}, "here: hidden_size is called d_model here"),
        ({"conv_size": "4"}, "conv_size: input should be a valid integer, got '4'"),
        ({"use_short_conv": 1}, "use_short_conv: input should be a valid boolean, got 1"),
        ({"n_heads": 0}, "n_heads: input should be greater than 0, got 0"),
        ({"norm_eps": float("nan")}, "norm_eps: input should be a finite number"),
    ],
)
def test_options_are_strict(options, message):
    with pytest.raises(UserError) as caught:
        registry.get("fla:gla").Config.parse(options, "here")
    assert message in str(caught.value)


def test_bounds_may_be_infinite_and_never_nan():
    parse = registry.get("fla:mamba2").Config.parse
    assert parse({"dt_limit": [0.0, float("inf")]}, "here").dt_limit == (0.0, float("inf"))
    with pytest.raises(UserError, match="dt_limit holds a NaN"):
        parse({"dt_limit": [0.0, float("nan")]}, "here")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fla:gatd_deltanet", "did you mean 'fla:gated_deltanet'"),
        ("fla:zzz", "mixlab mixers --fla lists them"),
        ("path_attn", "unknown mixer 'path_attn'; did you mean 'fla:path_attn'?"),
        ("fla:yoco_cross_attention", "no mixer on its own: it reads keys and values that another layer builds"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(UserError) as caught:
        registry.get(name)
    assert message in str(caught.value)


def test_without_the_library_the_way_to_get_it_is_said(monkeypatch):
    monkeypatch.setattr("mixers.fla_layers.layer.package_folder", lambda: None)
    monkeypatch.setattr("mixers.fla_layers.listing.package_folder", lambda: None)
    with pytest.raises(UserError, match=r"'fla:gla': needs the package flash-linear-attention.*pip install"):
        registry.get("fla:gla")
    assert fla_layers.layer_names() == []
    done = CliRunner().invoke(mixers_command, ["--fla"])
    assert isinstance(done.exception, UserError)


def test_the_listing_imports_nothing_and_invents_no_bytes():
    rows = json.loads(CliRunner().invoke(mixers_command, ["--fla", "--json"]).output)
    by_name = {row["name"]: row for row in rows}
    assert len(rows) == len(FACTS)
    assert by_name["fla:gla"]["state_bytes"] is None
    assert by_name["fla:gla"]["flops_per_token"] is None
    assert by_name["fla:attn"]["needs"] == ["flash_attn"]
    assert "fla:based" in CliRunner().invoke(mixers_command, ["--fla"]).output


def experiment(pattern):
    model = {"pattern": pattern, "d_model": 8, "n_layers": 1}
    return ExperimentConfig.parse({"model": model, "task": {"name": "mqar"}, "train": {"max_steps": 1}}, "test")


def test_a_plan_needs_no_gpu():
    validate_model(experiment("fla:gla(n_heads=2)"))
    with pytest.raises(UserError, match="fla:gla: head: unknown key"):
        validate_model(experiment("fla:gla(head=2)"))


def test_the_suite_of_layers_covers_the_table():
    assert set(OPTIONS) | {"hgrn"} == set(FACTS)
    assert set(NOT_STREAMING) | set(FAULTY) <= set(FACTS)


def built(options=None, **facts):
    torch.manual_seed(0)
    cls = stand_in(**facts)
    return cls(cls.Config.parse({"d_model": 8, **(options or {})}, "here"))


@pytest.mark.parametrize("continues", ["any", "single"])
@pytest.mark.parametrize("cuts", [[1] * 7, [4, 3], [0, 1, 0, 6], [7]])
def test_any_cut_equals_one_call_and_no_state_is_changed(continues, cuts):
    mixer = built({"single_only": continues == "single"}, continues=continues)
    x = torch.randn(2, 7, 8)
    one = mixer(x, return_state=True)
    state, start, ys = mixer.initial_state(2, device="cpu", dtype=x.dtype), 0, []
    for n_tokens in cuts:
        before = [part.clone() for part in state_tensors(state)]
        out = mixer(x[:, start : start + n_tokens], state, return_state=True)
        assert all(torch.equal(a, b) for a, b in zip(before, state_tensors(state), strict=True))
        ys.append(out.y)
        state, start = out.state, start + n_tokens
    torch.testing.assert_close(torch.cat(ys, 1), one.y)
    for left, right in zip(state_tensors(state), state_tensors(one.state), strict=True):
        torch.testing.assert_close(left, right)
    assert int(state.seen) == 7
    assert mixer(x).state is None


def test_a_state_keeps_no_larger_buffer_alive_and_its_bytes_are_those_of_its_tensors():
    state = built()(torch.randn(2, 7, 8), return_state=True).state
    kept = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in state_tensors(state)}
    assert sum(kept.values()) == state_bytes(state) == 2 * 2 * 8 * 4 + 8


def test_left_padding_changes_nothing_real_and_goes_on_in_the_state():
    mixer = built()
    x = torch.randn(2, 7, 8)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    padded = x.masked_fill(~mask[..., None], float("nan"))
    alone = mixer(x[:1, 3:]).y
    y = mixer(padded, mask=mask).y
    torch.testing.assert_close(y[:1, 3:], alone)
    assert not y[0, :3].any()
    first = mixer(padded[:, :5], mask=mask[:, :5], return_state=True)
    second = mixer(x[:, 5:], first.state, mask=mask[:, 5:], return_state=True)
    torch.testing.assert_close(second.y[:1], alone[:, 2:])
    assert second.state.padding.tolist() == [3, 0]
    with pytest.raises(UserError, match="padding behind a state"):
        mixer(padded, first.state, mask=mask)


def test_right_padding_is_free_where_no_state_is_asked():
    mixer = built()
    x = torch.randn(1, 5, 8)
    mask = torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(mixer(x, mask=mask).y[:, :3], mixer(x[:, :3]).y)
    with pytest.raises(UserError, match="must be at the left of each sequence;"):
        mixer(x, mask=mask, return_state=True)
    with pytest.raises(UserError, match="or at the right of all"):
        mixer(x, mask=torch.tensor([[True, False, True, True, True]]))
    with pytest.raises(UserError, match="a sequence of padding only"):
        mixer(torch.randn(2, 2, 8), mask=torch.tensor([[True, True], [False, False]]), return_state=True)
    with pytest.raises(UserError, match="understands no left padding"):
        built(mask="none")(x, mask=~mask)


def test_refusals_say_what_to_do():
    x = torch.randn(1, 3, 8)
    with pytest.raises(UserError, match="keeps no state"):
        built(growth="none", continues="never")(x, return_state=True)
    with pytest.raises(UserError, match=r"call \.eval\(\) first"):
        built(inference_only="eval")(x, return_state=True)
    with pytest.raises(UserError, match=r"within torch\.no_grad"):
        built(inference_only="no_grad").eval()(x, return_state=True)
    with pytest.raises(UserError, match="bfloat16 and float16 only"):
        built(dtypes="half")(x)
    with pytest.raises(UserError, match="no kernel of fla computes in float64"):
        built().double()(x.double())
    with pytest.raises(UserError, match="fla's Memory refuses these options: AssertionError: hidden_size must be"):
        built({"n_heads": 3})
    refusing = built({"single_only": True})
    state = refusing(x, return_state=True).state
    with pytest.raises(UserError, match="refuses this call: NotImplementedError: a single token at a time"):
        refusing(x, state)


def test_on_the_cpu_the_way_out_is_a_gpu(monkeypatch):
    mixer = built()
    monkeypatch.setattr(type(mixer), "traits", registry.get("fla:gla").traits)
    with pytest.raises(UserError, match="needs a GPU, and its input is on cpu"):
        mixer(torch.randn(1, 3, 8))


def test_building_without_triton_is_a_clear_error(monkeypatch):
    monkeypatch.setattr("mixers.fla_layers.layer.FLA_MISSING", ("triton",))
    with pytest.raises(UserError, match=r"mixer 'fla:gla': needs the package triton.*pip install"):
        registry.build("fla:gla", {"d_model": 64})


def test_reset_draws_everything_anew():
    mixer = built()
    with torch.no_grad():
        for value in (*mixer.parameters(), *mixer.buffers()):
            value.fill_(float("nan"))
    torch.manual_seed(0)
    mixer.reset_parameters()
    for ours, fresh in zip(mixer.state_dict().values(), built().state_dict().values(), strict=True):
        assert torch.equal(ours, fresh)


def test_what_the_library_frees_from_weight_decay_is_free():
    options = built().parameter_options()
    assert list(options) == ["layer.proj.weight"]
    assert not options["layer.proj.weight"].weight_decay


@pytest.mark.parametrize("continues", ["any", "never"])
def test_costs_that_cannot_be_known_have_no_entry(monkeypatch, continues):
    cls = stand_in(continues=continues, **({"growth": "none"} if continues == "never" else {}))
    monkeypatch.setattr("mixers.fla_layers.layer_class", lambda name: cls)
    config = experiment("fla:stand_in")
    cost = measure_cost(build_model(config, 32), 6, Compute(torch.device("cpu"), None))
    assert "flops_per_token" not in cost
    assert cost["prefill_tokens_per_s"] > 0
    assert cost["params"] > 0
    assert ("state_bytes" in cost) == ("decode_ms_per_token" in cost) == (continues == "any")


def relative(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def n_numbers(state):
    return sum(part.numel() for part in state_tensors(state))


def on_cuda(name):
    """The layer in bfloat16 on CUDA; skipped, with its reason, where it can't be built."""
    torch.manual_seed(0)
    cls = registry.get(f"fla:{name}")
    missing = [package for package in cls.facts.needs if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    mixer = registry.build(f"fla:{name}", {"d_model": D, **OPTIONS.get(name, {})}).to("cuda", torch.bfloat16)
    for parameter in mixer.parameters():
        if not parameter.any():  # projections that start at zero would hide everything
            torch.nn.init.normal_(parameter, std=0.1)
    return mixer


cuda = pytest.mark.cuda


@cuda
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(FACTS))
def test_outputs_and_gradients_are_finite(name):
    mixer = on_cuda(name).train()
    x = torch.randn(2, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    refused = mixer.facts.gated_backward and gated_backward_fault(
        x.device, mended_by_tilelang=mixer.facts.gated_backward == "tilelang"
    )
    if refused:
        with pytest.raises(UserError, match="training is refused here"):
            mixer(x)
        with torch.no_grad():
            assert mixer.eval()(x).y.isfinite().all()
        return
    y = mixer(x).y
    assert y.shape == x.shape
    assert y.isfinite().all()
    y.float().square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()
    for parameter_name, parameter in mixer.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), parameter_name


@cuda
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
@pytest.mark.parametrize("name", sorted(FACTS))
def test_prefill_and_single_tokens_equal_one_call(name):
    if name in FAULTY:
        pytest.skip(FAULTY[name])
    mixer = on_cuda(name).eval()
    x = torch.randn(2, T, D, device="cuda", dtype=torch.bfloat16)
    one = mixer(x).y
    if not mixer.traits.resumable:
        with pytest.raises(UserError, match="keeps no state"):
            mixer(x, return_state=True)
        return
    first = mixer(x[:, : T - 4], return_state=True)
    before = [part.clone() for part in state_tensors(first.state)]
    ys, state = [first.y], first.state
    for t in range(T - 4, T):
        out = mixer(x[:, t : t + 1], state, return_state=True)
        ys.append(out.y)
        state = out.state
    together = mixer(x[:, T - 4 :], first.state).y
    assert all(torch.equal(a, b) for a, b in zip(before, state_tensors(first.state), strict=True)), "state was changed"
    assert int(state.seen) == T
    # Numbers, not bytes: behind single tokens some kernels hand back the state in the input's narrower type.
    assert n_numbers(state) >= n_numbers(first.state) > 1
    assert all(part.isfinite().all() for part in state_tensors(state))
    tail = torch.cat(ys[1:], 1)
    pairs = ((ys[0], one[:, : T - 4]), (tail, one[:, T - 4 :]), (together, one[:, T - 4 :]))
    differs = max(relative(found, expected) for found, expected in pairs)
    if name in NOT_STREAMING:
        assert differs > BF16, f"the excuse is stale: {NOT_STREAMING[name]}"
    else:
        assert differs <= BF16
    bytes_at = [state_bytes(mixer(x[:, :n], return_state=True).state) for n in (16, 32, 64)]
    if mixer.state_growth == "constant":
        assert bytes_at[0] == bytes_at[1] == bytes_at[2]
    elif mixer.state_growth == "linear":
        assert bytes_at[2] - bytes_at[1] == 2 * (bytes_at[1] - bytes_at[0]) > 0


@cuda
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
@pytest.mark.parametrize("name", sorted(name for name, facts in FACTS.items() if facts.mask != "none"))
def test_left_padding_on_cuda(name):
    mixer = on_cuda(name).eval()
    x = torch.randn(2, 20, D, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(2, 20, dtype=torch.bool, device="cuda")
    mask[0, :3] = False
    padded = x.masked_fill(~mask[..., None], float("nan"))
    y = mixer(padded, mask=mask).y
    assert not y[0, :3].any()
    assert relative(y[:1, 3:], mixer(x[:1, 3:]).y) <= BF16
    assert relative(y[1:], mixer(x[1:]).y) <= BF16
