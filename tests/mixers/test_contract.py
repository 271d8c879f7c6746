"""The shipped contract suite on every registered mixer, with small options."""

import pytest

from mixers import contract, registry

D = 16
# Options to try, beside d_model; a mixer that isn't named here is tried with its defaults.
OPTIONS = {
    "softmax": [
        {"n_heads": 2},
        {"n_heads": 4, "n_kv_heads": 2, "window": 4, "qk_norm": True},
        {"impl": "reference", "yarn_factor": 4.0, "yarn_original_length": 8},
        {"n_heads": 2, "sink_logits": True},
        {"n_heads": 4, "n_kv_heads": 2, "window": 4, "sink_tokens": 2, "sink_logits": True},
        {"impl": "reference", "window": 3, "sink_tokens": 5, "qk_norm": True},
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
    "pkm": [
        {"impl": "sparse", "n_subkeys": 8, "n_heads": 2, "key_dim": 8, "value_dim": 8, "top_k": 4},
        {"impl": "reference", "n_subkeys": 6, "n_heads": 2, "key_dim": 6, "top_k": 3},
        {"n_subkeys": 6, "n_heads": 2, "key_dim": 6, "top_k": 3, "query_norm": "batch", "use_gate": False},
        {"n_subkeys": 6, "top_k": 3, "query_norm": "none", "score": "idw", "train_keys": False, "value_lr_scale": 4.0},
    ],
    "peer": [
        {"impl": "sparse", "n_subkeys": 8, "n_heads": 2, "key_dim": 8, "top_k": 4},
        {"impl": "reference", "n_subkeys": 6, "n_heads": 2, "key_dim": 6, "top_k": 3},
        {"n_subkeys": 6, "key_dim": 6, "top_k": 3, "query_norm": "batch", "expert_weights": "sigmoid"},
        {"n_subkeys": 6, "top_k": 3, "shared_keys": False, "activation": "silu", "train_keys": False},
    ],
    "fwpkm": [
        {"impl": "sparse", "n_subkeys": 8, "key_dim": 8, "value_dim": 8, "top_k": 4, "chunk_size": 8},
        {"n_subkeys": 8, "key_dim": 8, "value_dim": 8, "top_k": 4, "chunk_size": 8},
        {"n_subkeys": 8, "key_dim": 8, "value_dim": 8, "top_k": 4, "chunk_size": 8, "scope": "shared"},
    ],
    "fast_mlp": [
        {"n_heads": 2, "hidden_dim": 6, "chunk_size": 8},
        {"chunk_size": 4, "lookahead": 0, "momentum": 0.9, "normalise": True, "lr": 1.0},
    ],
    "lact": [
        {"n_heads": 2, "chunk_size": 4, "rope": False, "silu": False, "normalise": False, "muon": False},
        {"n_heads": 2, "chunk_size": 4, "window": 5, "n_window_heads": 4},
        {"chunk_size": 8, "window": 0, "memory_rope": False, "momentum": False, "muon": False, "hidden_dim": 6},
        {"n_heads": 4, "n_window_heads": 2, "chunk_size": 4, "read_scale": True, "impl": "reference"},
    ],
    "ttt": [
        {"n_heads": 2, "chunk_size": 8},
        {"chunk_size": 4, "base_lr": 4.0, "rope": False, "use_output_gate": True},
        {"inner": "mlp", "n_heads": 2, "chunk_size": 4},
        {"inner": "mlp", "hidden_dim": 5, "chunk_size": 8, "init_std": 0.3},
    ],
}
# Excuses that hold for these options, not for the defaults.
SHORT_WINDOW = {
    "nan_in_future": "softmax attention works in query blocks longer than these windows, and 0 * NaN is NaN"
}
OPTION_EXCUSES = {"based": SHORT_WINDOW, "lact": SHORT_WINDOW}
# Tracing takes seconds: the first options stand for all, with three chunks. mixlab check --all traces the defaults.
THREE_CHUNKS = {"chunk_size": 8}
CASES = [
    pytest.param(
        name,
        options | THREE_CHUNKS if check == "compile" and "chunk_size" in options else options,
        check,
        id=f"{name}-{i}-{check}",
    )
    for name in registry.names()
    for i, options in enumerate(OPTIONS.get(name, [{}]))
    for check in contract.CHECKS
    if check != "compile" or i == 0
]


@pytest.mark.parametrize(("name", "options", "check"), CASES)
def test_contract(name, options, check):
    excuses = {
        **contract.declared_excuses(registry.get(name)),
        **({} if options.get("window") == 0 else OPTION_EXCUSES.get(name, {})),
    }
    contract.require(check, lambda: registry.build(name, {"d_model": D, **options}), excuses=excuses)


def test_options_name_registered_mixers():
    assert {*OPTIONS, *OPTION_EXCUSES} <= set(registry.names())
