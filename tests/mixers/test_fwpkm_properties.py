"""What holds of the fast-weight memory's reference and sparse form beyond equality: purity, determinism, ties, NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixers.fwpkm import fast_weight_pkm
from mixers.product_keys import best_halves
from tests.mixers.test_fwpkm import draw

IMPLS = ["reference", "sparse"]
CALL = {"chunk_size": 7, "top_k": 3}


def results(out) -> tuple[Tensor, ...]:
    return out.read, out.keys, out.values, out.weights


def total(out) -> Tensor:
    """A loss on every differentiable output, the same for the same shapes."""
    generator = torch.Generator().manual_seed(9)
    return sum((torch.randn(t.shape, generator=generator, dtype=t.dtype) * t).sum() for t in results(out))


def gradients(x: dict[str, Tensor], impl: str, **options) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total(fast_weight_pkm(**x, **(CALL | options), impl=impl)), list(x.values()))


def assert_bit_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("scope", ["sequence", "shared"])
@pytest.mark.parametrize("impl", IMPLS)
class TestCalls:
    def test_activation_checkpointing_is_bit_equal(self, impl: str, scope: str) -> None:
        x = draw()
        names = list(x)

        def run(*tensors: Tensor) -> Tensor:
            return total(fast_weight_pkm(**dict(zip(names, tensors, strict=True)), **CALL, scope=scope, impl=impl))

        again = checkpoint(run, *x.values(), use_reentrant=False)
        assert_bit_equal(torch.autograd.grad(again, list(x.values())), gradients(x, impl, scope=scope))

    def test_a_second_forward_before_the_first_backward(self, impl: str, scope: str) -> None:
        x, other = draw(0), draw(1)
        first = fast_weight_pkm(**x, **CALL, scope=scope, impl=impl)
        # On the first's memory as well as on other tokens.
        fast_weight_pkm(**(other | {"keys": x["keys"], "values": x["values"]}), **CALL, scope=scope, impl=impl)
        got = torch.autograd.grad(total(first), list(x.values()))
        assert_bit_equal(got, gradients(x, impl, scope=scope))

    def test_backward_twice(self, impl: str, scope: str) -> None:
        x = draw()
        loss = total(fast_weight_pkm(**x, **CALL, scope=scope, impl=impl))
        once = torch.autograd.grad(loss, list(x.values()), retain_graph=True)
        assert_bit_equal(torch.autograd.grad(loss, list(x.values())), once)

    def test_a_call_changes_nothing_and_repeats_bit_by_bit(self, impl: str, scope: str) -> None:
        x = draw()
        before = {name: tensor.detach().clone() for name, tensor in x.items()}
        versions = [tensor._version for tensor in x.values()]
        first, second = (fast_weight_pkm(**x, **CALL, scope=scope, impl=impl) for _ in range(2))
        assert_bit_equal(tuple(first), tuple(second))
        got = torch.autograd.grad(total(first), list(x.values()))
        assert_bit_equal(torch.autograd.grad(total(second), list(x.values())), got)
        assert [tensor._version for tensor in x.values()] == versions
        assert all(torch.equal(x[name], tensor) for name, tensor in before.items())

    def test_without_grad_the_results_are_the_same(self, impl: str, scope: str) -> None:
        x = draw()
        want = fast_weight_pkm(**x, **CALL, scope=scope, impl=impl)
        with torch.no_grad():
            got = fast_weight_pkm(**x, **CALL, scope=scope, impl=impl)
        assert not any(tensor.requires_grad for tensor in got)
        assert_bit_equal(tuple(got), tuple(want))

    def test_inputs_in_any_layout(self, impl: str, scope: str) -> None:
        x = draw()
        turned = {
            name: tensor.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
            for name, tensor in x.items()
        }
        assert not any(tensor.is_contiguous() for tensor in turned.values())
        for got, want in zip(gradients(turned, impl, scope=scope), gradients(x, impl, scope=scope), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)

    def test_expanded_inputs_and_cotangents(self, impl: str, scope: str) -> None:
        one = draw(B=1)
        wide = {
            name: tensor.expand(3, *tensor.shape[1:]) if name in ("q", "v", "gate") else tensor
            for name, tensor in one.items()
        }
        found = []
        for x in (wide, {name: tensor.clone() for name, tensor in wide.items()}):
            # sum() hands back an expanded cotangent.
            out = fast_weight_pkm(**x, **CALL, scope=scope, impl=impl)
            found.append(torch.autograd.grad(sum(t.sum() for t in results(out)), list(one.values())))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["q", "v"])
def test_nan_stays_in_its_sequence(name: str, impl: str) -> None:
    x = {key: tensor.detach() for key, tensor in draw(B=2).items()}
    bad = x | {name: x[name].clone()}
    bad[name][0, 2] = float("nan")
    found = []
    for inputs in (x, bad):
        inputs = {key: tensor.clone().requires_grad_() for key, tensor in inputs.items()}
        out = fast_weight_pkm(**inputs, **CALL, scope="sequence", impl=impl)
        grads = torch.autograd.grad(out.read[1].square().sum() + out.values[1].sum(), [inputs["q"], inputs["v"]])
        found.append(([out.read[1], out.keys[1], out.values[1], out.weights[1]], [g[1] for g in grads]))
        last = out
    assert_bit_equal(found[1][0], found[0][0])
    # Inner products may round by where in memory a row lies, which the other sequence's slots decide.
    for got, want in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert last.read[0].isnan().any()


@pytest.mark.parametrize(
    ("scope", "options"),
    [
        ("sequence", {}),
        ("shared", {"score": "dot", "lookahead": 0}),
        ("shared", {"value_loss_to_keys": True, "update_scale": "released", "temperature": 0.5}),
    ],
    ids=str,
)
def test_sparse_gradients_by_finite_differences(scope: str, options: dict) -> None:
    x = draw(B=2, T=5, n=3, V=2, H=1, K=4)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return results(fast_weight_pkm(*tensors, chunk_size=2, top_k=2, scope=scope, impl="sparse", **options))

    assert torch.autograd.gradcheck(run, tuple(x.values()), eps=1e-7, atol=1e-6, fast_mode=True)


def tied(seed: int = 0) -> dict[str, Tensor]:
    """Every sub-key three times, every value row that of its class: exact ties, also across the k-th place for k=4."""
    x = {name: tensor.detach() for name, tensor in draw(seed, T=6, n=3).items()}
    keys = x["keys"].repeat(1, 1, 3, 1)
    table = x["values"].view(3, 3, -1).repeat(3, 3, 1)
    x |= {"keys": keys, "values": table.reshape(81, -1)}
    return {name: tensor.requires_grad_() for name, tensor in x.items()}


@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize("impl", IMPLS)
def test_ties(impl: str, score: str) -> None:
    """Whichever of the tied slots are taken, the scores are those of the k best of all n*n, each with its multiplicity,
    and so are the reads and the queries' gradients where tied slots hold equal rows."""
    x = tied()
    options = {"chunk_size": 6, "top_k": 4, "score": score, "impl": impl}
    out = fast_weight_pkm(**x, **options)
    assert_bit_equal(tuple(out), tuple(fast_weight_pkm(**x, **options)))

    # All n*n sums, chosen by a stable sort: lowest index first.
    halves = x["q"].unflatten(-1, (2, 1, -1))
    scores = (halves * x["keys"]).sum(-1)
    if score == "idw":
        scores = -torch.log(1e-3 + (halves - x["keys"]).square().sum(-1))
    sums = (scores[..., 0, :, None] + scores[..., 1, None, :]).flatten(-2)
    best = sums.sort(dim=-1, descending=True, stable=True)
    weights = torch.softmax(best.values[..., :4].flatten(-2), dim=-1).view(out.weights.shape)
    rows = x["values"][best.indices[..., :4]]
    read = (weights.unsqueeze(-1) * rows).sum((2, 3))
    torch.testing.assert_close(out.weights, weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.read, read, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(read)
    inputs = [x["q"], x["values"], x["keys"]]
    got, want = (torch.autograd.grad((cotangent * t).sum(), inputs, retain_graph=True) for t in (out.read, read))
    torch.testing.assert_close(got[0], want[0], rtol=1e-9, atol=1e-9)
    # Of the tied slots only the sum over a class is determined.
    by_class = [g[1].view(3, 3, 3, 3, -1).sum((0, 2)) for g in (got, want)]
    torch.testing.assert_close(*by_class, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(g[2].unflatten(2, (3, 3)).sum(2) for g in (got, want)), rtol=1e-9, atol=1e-9)
    assert all(torch.isfinite(g).all() for g in gradients(x, impl, top_k=4, chunk_size=2, score=score))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_memory_of_equal_sub_keys(impl: str) -> None:
    x = draw()
    x["keys"] = torch.zeros_like(x["keys"]).requires_grad_()
    first, second = (fast_weight_pkm(**x, **CALL, impl=impl) for _ in range(2))
    assert_bit_equal(tuple(first), tuple(second))
    of_head = first.weights[:, :7]
    torch.testing.assert_close(of_head, of_head.mean(-1, keepdim=True).expand_as(of_head))
    assert all(torch.isfinite(g).all() for g in gradients(x, impl))


@pytest.mark.parametrize("score", ["idw", "dot"])
def test_near_ties_cost_no_more_than_rounding(score: str) -> None:
    """The k-th best is ranked by a score that cancels: what is chosen instead is as good to rounding."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 2, 2, 1, 8, generator=generator)
    keys = centre + 1e-4 * torch.randn(1, 2, 2, 50, 8, generator=generator)
    halves = centre.squeeze(3).unsqueeze(1) + 1e-4 * torch.randn(1, 40, 2, 2, 8, generator=generator)
    chosen = best_halves(halves, keys, 5, score)
    exact = (halves.double().unsqueeze(-2) * keys.double().unsqueeze(1)).sum(-1)
    if score == "idw":
        exact = -(halves.double().unsqueeze(-2) - keys.double().unsqueeze(1)).square().sum(-1)
    got = exact.gather(-1, chosen).sort(-1, descending=True).values
    size = halves.norm(dim=-1).max().item() * keys.norm(dim=-1).max().item()
    assert (got - exact.topk(5).values).abs().max() <= 16 * torch.finfo(torch.float32).eps * size
