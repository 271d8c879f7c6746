"""The contract of mixers.base, measured on every registered mixer with small options."""

import itertools
import zlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mixers import registry
from mixers.base import map_state, state_bytes, state_tensors
from mixers.errors import UserError

D = 16
# Options to try, beside d_model; a mixer that isn't named here is tried with its defaults.
OPTIONS = {
    "softmax": [
        {"n_heads": 2},
        {"n_heads": 4, "n_kv_heads": 2, "window": 4, "qk_norm": True},
        {"impl": "reference", "yarn_factor": 4.0, "yarn_original_length": 8},
    ],
    "linear_attention": [
        {"n_heads": 2, "chunk_size": 4},
        {"feature_map": "taylor", "key_dim": 4, "chunk_size": 4},
        {"feature_map": "identity", "normalize": False, "chunk_size": 4},
    ],
    "gated_deltanet": [
        {"n_heads": 2, "chunk_size": 4},
        {"chunk_size": 4, "conv_kernel": 0, "use_output_gate": False, "value_dim": 6},
    ],
    "gla": [
        {"n_heads": 2, "chunk_size": 4},
        {"chunk_size": 4, "use_output_gate": False, "key_dim": 5, "value_dim": 6, "decay_temperature": 1.0},
    ],
    "hgrn2": [
        {"n_heads": 2, "chunk_size": 4},
        {"chunk_size": 4, "lower_bound": 0.5, "key_dim": 5, "value_dim": 6},
    ],
    "mamba2": [
        {"n_heads": 4, "n_groups": 2, "key_dim": 6, "chunk_size": 4},
        {"conv_kernel": 0, "key_dim": 5, "expand": 0.5, "chunk_size": 4},
    ],
    "retention": [
        {"n_heads": 2, "chunk_size": 4},
        {"chunk_size": 4, "rope": False, "use_output_gate": False, "key_dim": 5, "value_dim": 6},
    ],
    "delta_net": [
        {"n_heads": 2, "chunk_size": 4},
        {"chunk_size": 4, "conv_kernel": 0, "value_dim": 6, "negative_eigenvalues": True},
    ],
    "kda": [
        {"n_heads": 2, "chunk_size": 4},
        {"chunk_size": 4, "conv_kernel": 0, "value_dim": 6, "gate_rank": 3},
    ],
    "rwkv7": [
        {"n_heads": 2, "chunk_size": 4},
        {"chunk_size": 4, "decay_rank": 3, "rate_rank": 2, "gate_rank": 5},
    ],
    "short_conv": [{}, {"kernel": 5, "inner_dim": 6}],
    "based": [
        {"n_heads": 2, "key_dim": 4, "window": 4, "chunk_size": 4},
        {"n_heads": 4, "key_dim": 3, "window": 3, "chunk_size": 4, "combine": "split", "n_window_heads": 1},
    ],
    "pkm": [{"n_subkeys": 8, "n_heads": 2, "key_dim": 8, "value_dim": 8, "top_k": 4}],
    "fwpkm": [
        {"n_subkeys": 8, "key_dim": 8, "value_dim": 8, "top_k": 4, "chunk_size": 8},
        {"n_subkeys": 8, "key_dim": 8, "value_dim": 8, "top_k": 4, "chunk_size": 8, "scope": "shared"},
    ],
    "fast_mlp": [
        {"n_heads": 2, "hidden_dim": 6, "chunk_size": 8},
        {"chunk_size": 4, "lookahead": 0, "momentum": 0.9, "normalise": True, "lr": 1.0},
    ],
    "ttt": [{"n_heads": 2, "chunk_size": 8}, {"chunk_size": 4, "base_lr": 4.0}],
}
# Exceptions, each with its reason; one that no longer holds fails its check.
NAN_SPREADS = {
    "softmax": "all queries of a call share one product with the values, and 0 * NaN is NaN",
    "based": "its window is softmax attention",
}
NO_GRADIENT: dict[str, dict[str, str]] = {}  # mixer -> parameter -> reason


def bag_flops(table_shape, index_shape, *_, **__):
    """A fused gather and weighted sum of J rows of width V is a product (1,J) x (J,V) a bag: torch counts none."""
    return 2 * index_shape[0] * table_shape[1]


BAG_FLOPS = {torch.ops.aten._embedding_bag: bag_flops, torch.ops.aten._embedding_bag_forward_only: bag_flops}

CASES = [(name, options) for name in registry.names() for options in OPTIONS.get(name, [{}])]
every_mixer = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
)


def build(name, options, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return registry.build(name, {"d_model": D, **options}).to(dtype)


def tokens(n_sequences, n_tokens, dtype=torch.float64):
    torch.manual_seed(zlib.crc32(f"{n_sequences},{n_tokens}".encode()))
    return torch.randn(n_sequences, n_tokens, D, dtype=dtype)


def assert_same(found, expected, atol=1e-9):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def assert_same_state(found, expected):
    pairs = list(zip(state_tensors(found), state_tensors(expected), strict=True))
    for got, want in pairs:
        assert_same(got, want)


@every_mixer
@pytest.mark.parametrize("n_tokens", [0, 1, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes(name, options, n_tokens, dtype):
    mixer, x = build(name, options, dtype), tokens(3, n_tokens, dtype)
    out = mixer(x)
    assert out.y.shape == x.shape
    assert out.y.dtype == dtype
    assert torch.isfinite(out.y).all()
    assert out.state is None
    assert all(torch.isfinite(value).all() and value.ndim == 0 for value in out.aux.values())
    assert (mixer(x, return_state=True).state is None) == (mixer.traits.state_growth == "none")


@every_mixer
@pytest.mark.parametrize("lengths", [[5, 16], [1, 0, 20], [8, 13], [1] * 21], ids=str)
def test_any_cut_equals_one_call(name, options, lengths):
    mixer, x = build(name, options), tokens(2, 21)
    whole = mixer(x, return_state=True)
    state, ys = None, []
    for part in x.split(lengths, dim=1):
        y, state, _ = mixer(part, state, return_state=True)
        ys.append(y)
    assert_same(torch.cat(ys, dim=1), whole.y)
    assert_same_state(state, whole.state)


@every_mixer
def test_causal_by_perturbation(name, options):
    mixer, x = build(name, options), tokens(2, 13)
    y = mixer(x).y
    for t in range(13):
        changed = x.clone()
        changed[:, t:] = 3 * torch.randn(2, 13 - t, D, dtype=x.dtype)
        assert_same(mixer(changed).y[:, :t], y[:, :t])
        assert (mixer(changed).y[:, t] - y[:, t]).abs().max() > 1e-6, f"token {t} does not reach its own output"


@every_mixer
def test_nan_in_the_future_stays_there(name, options):
    """From the start of a chunk: within one, a masked weight of zero times NaN is NaN."""
    mixer, x = build(name, options), tokens(2, 12)
    clean = mixer(x).y[:, :8]
    x[:, 8:] = float("nan")
    y = mixer(x).y[:, :8]
    if name in NAN_SPREADS:
        assert y.isnan().any(), f"stale exception: {NAN_SPREADS[name]}"
    else:
        assert_same(y, clean)


@every_mixer
@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_nothing(name, options, training):
    mixer, x = build(name, options).train(training), tokens(2, 13)
    state = mixer(x, return_state=True).state
    kept = [part.clone() for part in (x, *mixer.state_dict().values(), *state_tensors(state))]
    random = torch.get_rng_state()
    mixer(x, state, return_state=True).y.sum().backward()
    assert torch.equal(torch.get_rng_state(), random)
    for now, before in zip((x, *mixer.state_dict().values(), *state_tensors(state)), kept, strict=True):
        assert torch.equal(now, before)


@every_mixer
def test_sequences_do_not_see_each_other(name, options):
    mixer, x = build(name, options), tokens(3, 13)
    y = mixer(x).y
    alone = torch.cat([mixer(row[None]).y for row in x])
    if mixer.state_scope == "shared":
        assert (y - alone).abs().max() > 1e-9, "declared as shared, but every sequence has its own state"
    else:
        assert_same(y, alone)


@every_mixer
def test_padding_reaches_no_real_token(name, options):
    mixer, x = build(name, options), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3] = False
    other = x.clone()
    other[0, :3] = 50 * torch.randn(3, D, dtype=x.dtype)
    y = mixer(x, mask=mask).y
    changed = mixer(other, mask=mask).y
    assert_same(changed[mask], y[mask])
    if mixer.traits.exact_chunking and mixer.state_scope == "sequence":
        assert_same(y[0, 3:], mixer(x[:1, 3:]).y[0])
        assert_same(y[1], mixer(x[1:]).y[0])


@every_mixer
def test_every_parameter_gets_a_gradient(name, options):
    mixer, x = build(name, options), tokens(2, 21)
    out = mixer(x)
    loss = (out.y * torch.randn_like(out.y)).sum()
    loss = loss + sum(value for key, value in out.aux.items() if key.startswith("loss/"))
    loss.backward()
    exceptions = NO_GRADIENT.get(name, {})
    for parameter_name, parameter in mixer.named_parameters():
        has_gradient = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), parameter_name
        assert has_gradient != (parameter_name in exceptions), parameter_name
    assert set(exceptions) <= {key for key, _ in mixer.named_parameters()}


@every_mixer
def test_gradient_by_finite_differences(name, options):
    mixer, x = build(name, options), tokens(2, 9).requires_grad_()
    torch.manual_seed(1)
    assert torch.autograd.gradcheck(lambda x: mixer(x).y, (x,), fast_mode=True, atol=1e-5, rtol=1e-4)


@every_mixer
def test_state_bytes_grow_as_declared(name, options):
    mixer = build(name, options, torch.float32)

    def measured(n_sequences, n_tokens):
        return state_bytes(mixer(tokens(n_sequences, n_tokens, torch.float32), return_state=True).state)

    by_tokens = [measured(2, n) for n in (8, 16, 24)]
    steps = [after - before for before, after in itertools.pairwise(by_tokens)]
    growth = mixer.state_growth
    if growth == "none":
        assert by_tokens == [0, 0, 0]
    elif growth == "linear":
        assert steps[0] == steps[1] > 0
    else:
        assert growth in ("constant", "window"), growth
        assert by_tokens[0] > 0
        assert steps == [0, 0]
        assert growth != "window" or measured(2, 1) < by_tokens[0]
    per_sequence = [measured(n + 1, 16) - measured(n, 16) for n in (1, 2)]
    assert per_sequence[0] == per_sequence[1]
    assert (per_sequence[0] > 0) == (growth != "none" and mixer.state_scope == "sequence")


@every_mixer
def test_initial_state_is_a_fresh_start(name, options):
    mixer, x = build(name, options), tokens(2, 13)
    start = mixer.initial_state(2, device="cpu", dtype=x.dtype)
    from_none, from_start = mixer(x, return_state=True), mixer(x, start, return_state=True)
    assert torch.equal(from_none.y, from_start.y)
    assert_same_state(from_none.state, from_start.state)
    assert map_state(lambda part: part, start) is not None or mixer.traits.state_growth == "none"


@every_mixer
def test_state_dict_round_trip(name, options):
    mixer, other, x = build(name, options), build(name, options, seed=1), tokens(2, 9)
    assert (mixer(x).y - other(x).y).abs().max() > 1e-6
    other.load_state_dict(mixer.state_dict(), strict=True)
    assert torch.equal(mixer(x).y, other(x).y)


@every_mixer
def test_reset_writes_every_parameter_and_buffer(name, options):
    mixer = build(name, options, torch.float32)
    results = []
    for poison in (float("nan"), 7.0):
        for value in mixer.state_dict().values():
            value.fill_(poison if value.is_floating_point() else 7)
        torch.manual_seed(0)
        mixer.reset_parameters()
        results.append([value.clone() for value in mixer.state_dict().values()])
    for first, second in zip(*results, strict=True):
        assert torch.isfinite(first).all()
        assert torch.equal(first, second)


@every_mixer
@pytest.mark.parametrize("context", [0, 3, 11])
def test_flops_of_one_more_token_are_what_torch_counts(name, options, context):
    fields = registry.get(name).Config.model_fields
    mixer = build(name, {**options, "impl": "reference"} if "impl" in fields else options)
    state = mixer(tokens(1, context), return_state=True).state
    with FlopCounterMode(display=False, custom_mapping=BAG_FLOPS) as counter:
        mixer(tokens(1, 1), state)
    assert mixer.flops_per_token(context) == counter.get_total_flops()


@every_mixer
def test_unknown_options_name_the_near_match(name, options):
    with pytest.raises(UserError, match=f"mixer '{name}': d_modle: unknown key; did you mean 'd_model'"):
        registry.build(name, {**options, "d_modle": D})


def test_tables_name_registered_mixers():
    tables = (OPTIONS, NAN_SPREADS, NO_GRADIENT)
    assert {name for table in tables for name in table} <= set(registry.names())
