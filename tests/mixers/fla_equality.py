"""The same layer by fla's kernels and by the reference, on CUDA: outputs, states and gradients."""

import pytest
import torch

from mixers import registry
from mixers.base import state_tensors
from mixers.errors import UserError

# fla sums the gradient of a head's decay from q dq - k dk, products of rounded factors (tf32) that nearly cancel.
DECAY_PARAMETERS = {
    "gated_deltanet": ("A_log", "dt_bias", "decay.weight"),
    "mamba2": ("A_log", "dt_bias", "step.weight"),
}
DECAY_TOLERANCE = 1e-1


def skip_where_refused(name, options, dtype=torch.float32):
    """Some cards and versions of triton have no right kernel: the layer says so, and nothing runs to be compared.

    Any other refusal is a failure.
    """
    try:
        _ = registry.build(name, options).to("cuda", dtype).impl
    except UserError as refusal:
        if "gated gradients" not in str(refusal):
            raise
        pytest.skip(str(refusal))


def assert_fla_equals_reference(name, n_tokens, dtype=torch.float32, tolerance=1e-2, **options):
    """From a state on, with left padding; the errors are relative norms."""
    torch.manual_seed(n_tokens)
    options = {"d_model": 64, "n_heads": 2, **options}
    skip_where_refused(name, {**options, "impl": "fla"}, dtype)
    reference = registry.build(name, {**options, "impl": "reference"}).to("cuda", dtype)
    fla = registry.build(name, {**options, "impl": "fla"}).to("cuda", dtype)
    fla.load_state_dict(reference.state_dict())
    x = torch.randn(2, n_tokens, 64, device="cuda", dtype=dtype)
    mask = torch.arange(n_tokens, device="cuda").expand(2, -1) >= min(3, n_tokens - 1)
    with torch.no_grad():
        start = reference(torch.randn(2, 5, 64, device="cuda", dtype=dtype), return_state=True).state
    results = []
    for layer in (reference, fla):
        leaf = x.clone().requires_grad_()
        out = layer(leaf, start, mask=mask, return_state=True)
        out.y.square().sum().backward()
        gradients = {key: parameter.grad for key, parameter in layer.named_parameters()}
        with torch.no_grad():
            decoded = layer(x[:, :1], start, return_state=True)
        states = [part for part in state_tensors((out.state, decoded.state)) if part.is_floating_point()]
        found = {"y": out.y, "decoded y": decoded.y, "gradient of x": leaf.grad}
        results.append(found | {f"state {i}": part for i, part in enumerate(states)} | gradients)
    wanted, found = results
    assert wanted.keys() == found.keys()
    wrong = {}
    for key, want in wanted.items():
        error = (found[key] - want).norm()
        allowed = DECAY_TOLERANCE if key in DECAY_PARAMETERS.get(name, ()) else tolerance
        if not error <= allowed * want.norm() + 1e-6:
            wrong[key] = (error / want.norm()).item()
    assert not wrong, f"relative errors {wrong}"
