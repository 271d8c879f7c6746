"""What all layers with decaying memories share: masks across cuts, autocast, half precision, compilation."""

import pytest
import torch

from mixers import registry

OPTIONS = {
    "retention": {"n_heads": 2, "chunk_size": 4},
    "gla": {"n_heads": 2, "chunk_size": 4},
    "hgrn2": {"n_heads": 2, "chunk_size": 4, "lower_bound": 0.3},
    "mamba2": {"n_heads": 2, "chunk_size": 4, "key_dim": 8},
}
every_layer = pytest.mark.parametrize("name", OPTIONS)


def build(name):
    torch.manual_seed(0)
    return registry.build(name, {"d_model": 16, **OPTIONS[name]}).double()


@every_layer
@pytest.mark.parametrize("lengths", [[5, 16], [1] * 21, [0, 20, 1]], ids=str)
def test_masked_tokens_across_a_cut(name, lengths):
    layer, x = build(name), torch.randn(2, 21, 16, dtype=torch.float64)
    mask = torch.rand(2, 21) > 0.4
    whole = layer(x, mask=mask, return_state=True)
    state, ys = None, []
    for part, part_mask in zip(x.split(lengths, dim=1), mask.split(lengths, dim=1), strict=True):
        y, state, _ = layer(part, state, return_state=True, mask=part_mask)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, dim=1), whole.y, rtol=0, atol=1e-10)
    torch.testing.assert_close(state.memory, whole.state.memory, rtol=0, atol=1e-10)


@every_layer
def test_padding_between_tokens_leaves_the_memory(name):
    layer = build(name)
    state = layer(torch.randn(2, 6, 16, dtype=torch.float64), return_state=True).state
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    after = layer(x, state, return_state=True, mask=torch.zeros(2, 5, dtype=torch.bool))
    assert torch.equal(after.state.memory, state.memory)
    assert (after.y == 0).all()


@every_layer
@pytest.mark.parametrize("n_tokens", [1, 21])
def test_bfloat16_stays_near_float64(name, n_tokens):
    """Within 3 times what rounding weights and inputs alone would do, and so under autocast."""
    layer, x = build(name), torch.randn(2, n_tokens, 16, dtype=torch.float64)
    exact = layer(x).y
    rounded = build(name).bfloat16()
    from_rounded = build(name)
    from_rounded.load_state_dict({key: value.double() for key, value in rounded.state_dict().items()})
    rounding = (from_rounded(x.bfloat16().double()).y - exact).norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = layer.float()(x.float(), return_state=True)
    assert autocast.state.memory.dtype == torch.float32
    for y in (rounded(x.bfloat16()).y, autocast.y):
        assert y.dtype == torch.bfloat16
        assert (y.double() - exact).norm() < 3 * rounding + 1e-3


@every_layer
def test_compiled_as_one_graph(name):
    layer, x = build(name), torch.randn(2, 9, 16, dtype=torch.float64)
    mask = torch.rand(2, 9) > 0.2
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        leaf = x.clone().requires_grad_()
        y = call(leaf, mask=mask).y
        y.square().sum().backward()
        results.append((y, leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-10)
