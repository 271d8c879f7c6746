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
    "pkm": [{"n_subkeys": 8, "n_heads": 2, "key_dim": 8, "value_dim": 8, "top_k": 4}],
    "fwpkm": [
        {"n_subkeys": 8, "key_dim": 8, "value_dim": 8, "top_k": 4, "chunk_size": 8},
        {"n_subkeys": 8, "key_dim": 8, "value_dim": 8, "top_k": 4, "chunk_size": 8, "scope": "shared"},
    ],
}
CASES = [(name, i, options) for name in registry.names() for i, options in enumerate(OPTIONS.get(name, [{}]))]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize(("name", "options"), [pytest.param(n, o, id=f"{n}-{i}") for n, i, o in CASES])
def test_contract(name, options, check):
    excuses = contract.declared_excuses(registry.get(name))
    contract.require(check, lambda: registry.build(name, {"d_model": D, **options}), excuses=excuses)


def test_options_name_registered_mixers():
    assert set(OPTIONS) <= set(registry.names())
