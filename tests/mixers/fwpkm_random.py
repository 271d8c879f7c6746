"""Random configurations of the fast-weight memory, and how an implementation is compared with the reference on them.

Every comparison is with the reference in float64, in one call. A difference is measured against the largest entry
expected (at least ``FLOOR``): 1e-10 of it in float64; in float32, as for the expected values of
``test_fwpkm_oracle.py``, 2e-5 of it or 20 times the reference's own float32 error, whichever is larger.

The choice of slots jumps where two scores cross, and a clipped gradient's derivative jumps at +-1. A configuration
that comes nearer to such a point than rounding can be trusted to resolve is given up (:func:`margin`), not compared
loosely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from mixers.fwpkm import fast_weight_pkm

INPUTS = ("q", "v", "gate", "keys", "values")
OUTPUTS = ("read", "keys", "values", "weights")
FLOOR = {torch.float64: 1.0, torch.float32: 0.1}
# The nearest that a decision may come to a tie, relative to the numbers compared.
SAFE = {torch.float64: 1e-8, torch.float32: 1e-4}
# What the Triton implementation refuses.
TRITON_REFUSES = ("value_loss_to_keys", "clip")


@dataclass(frozen=True)
class Configuration:
    """Sizes, options and inputs of a call; ``cuts``: where it is cut into several, at chunk boundaries.

    own_memory: keys and values carry a leading B. outputs: what a random cotangent flows into. inputs: what requires a
    gradient.
    """

    B: int
    T: int
    H: int
    half_dim: int
    n: int
    V: int
    k: int
    C: int
    scope: str
    own_memory: bool
    options: dict[str, Any]
    gated: bool
    mask: str
    cuts: tuple[int, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    seed: int


@st.composite
def configurations(draw: st.DrawFn, max_tokens: int = 19, refused: tuple[str, ...] = ()) -> Configuration:
    """Configurations without the options named in ``refused``."""
    n = draw(st.integers(1, 7))
    n_tokens = draw(st.integers(0, max_tokens))
    # At most six chunks: every chunk multiplies the rounding error of the keys before it.
    chunk_size = draw(st.integers(max(1, -(-n_tokens // 6)), 8))
    n_chunks = -(-n_tokens // chunk_size)
    scope = draw(st.sampled_from(["sequence", "shared"]))
    options = {
        "update_scale": draw(st.sampled_from(["paper", "released"])),
        "lookahead": draw(st.integers(0, 2)),
        "lr": draw(st.sampled_from([1.0, 0.3])),
        "score": draw(st.sampled_from(["idw", "dot"])),
        "temperature": draw(st.sampled_from([0.5, 1.0, 2.0])),
        "address_weight": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "value_loss_to_keys": draw(st.booleans()),
        "clip": draw(st.booleans()),
    }
    gated = draw(st.booleans())
    possible = INPUTS if gated else tuple(name for name in INPUTS if name != "gate")
    cuts = draw(st.sets(st.integers(0, n_chunks), max_size=3))
    return Configuration(
        B=draw(st.integers(1, 3)),
        T=n_tokens,
        H=draw(st.integers(1, 3)),
        half_dim=draw(st.integers(1, 4)),
        n=n,
        V=draw(st.integers(1, 6)),
        k=draw(st.integers(1, n)),
        C=chunk_size,
        scope=scope,
        own_memory=scope == "sequence" and draw(st.booleans()),
        options={name: value for name, value in options.items() if name not in refused},
        gated=gated,
        mask=draw(st.sampled_from(["none", "left padding", "holes", "nothing real", "numbers"])),
        cuts=tuple(sorted(min(cut * chunk_size, n_tokens) for cut in cuts)),
        outputs=_some(draw, OUTPUTS),
        inputs=_some(draw, possible),
        seed=draw(st.integers(0, 2**20)),
    )


def _some(draw: st.DrawFn, names: tuple[str, ...]) -> tuple[str, ...]:
    """All of the names half of the time, else a subset that isn't empty."""
    if draw(st.booleans()):
        return names
    chosen = draw(st.sets(st.sampled_from(names), min_size=1))
    return tuple(name for name in names if name in chosen)


def draw_inputs(c: Configuration) -> dict[str, Tensor]:
    """Float64 inputs whose numbers are exact in float32, the mask included, and the cotangents ``d_<output>``."""
    generator = torch.Generator().manual_seed(c.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    lead = (c.B,) if c.own_memory else ()
    memories = (c.B,) if c.scope == "sequence" else ()
    x = {
        "q": normal(c.B, c.T, c.H, 2 * c.half_dim),
        "v": normal(c.B, c.T, c.V),
        "keys": normal(*lead, c.H, 2, c.n, c.half_dim),
        "values": normal(*lead, c.n**2, c.V),
        "d_read": normal(c.B, c.T, c.V),
        "d_keys": normal(*memories, c.H, 2, c.n, c.half_dim),
        "d_values": normal(*memories, c.n**2, c.V),
        # Of a slot's weight, wherever the slot stands in the list.
        "d_weights": normal(c.B, c.T, c.n**2),
    }
    if c.gated:
        x["gate"] = torch.rand(c.B, c.T, generator=generator).double()
    if c.mask == "left padding":
        n_padding = torch.randint(0, c.T + 1, (c.B, 1), generator=generator)
        x["mask"] = torch.arange(c.T) >= n_padding
    elif c.mask == "nothing real":
        x["mask"] = torch.zeros(c.B, c.T, dtype=torch.bool)
    elif c.mask != "none":
        holes = torch.rand(c.B, c.T, generator=generator) < 0.7
        x["mask"] = holes if c.mask == "holes" else holes.long()
    return x


def call(impl: str, x: dict[str, Tensor], mask: Tensor | None, c: Configuration, **changes: Any) -> Any:
    """One call of an implementation."""
    options = {"chunk_size": c.C, "top_k": c.k} | c.options | changes
    return fast_weight_pkm(**({"gate": None} | x), mask=mask, scope=c.scope, impl=impl, **options)


def run(impl: str, c: Configuration, dtype: torch.dtype, cuts: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Outputs, losses and gradients (``grad_<input>``) of one call, or of several with the memory handed on.

    Slots and weights are sorted by slot within a token's head: their order in the list isn't compared.
    """
    drawn = draw_inputs(c)
    mask = drawn.pop("mask", None)
    drawn = {name: tensor.to(dtype) for name, tensor in drawn.items()}
    x = {name: drawn[name].requires_grad_(name in c.inputs) for name in INPUTS if name in drawn}
    parts, now = [], dict(x)
    lengths = [stop - start for start, stop in zip((0, *cuts), (*cuts, c.T), strict=True)]
    n_pairs = n_chunks = 0
    value_loss = address_loss = torch.zeros((), dtype=dtype)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        tokens = {name: now[name][:, part] for name in ("q", "v", "gate") if name in now}
        out = call(impl, now | tokens, None if mask is None else mask[:, part], c)
        parts.append(out)
        now = now | {"keys": out.keys, "values": out.values}
        chunks = [min(c.C, length - i) for i in range(0, length, c.C)]
        pairs = c.B * sum(max(size - c.options["lookahead"], 0) for size in chunks)
        value_loss, n_pairs = value_loss + pairs * out.value_loss, n_pairs + pairs
        address_loss, n_chunks = address_loss + len(chunks) * out.address_loss, n_chunks + len(chunks)
        start += length
    slots, weights = (torch.cat([getattr(out, name) for out in parts], dim=1) for name in ("slots", "weights"))
    assert slots.dtype == torch.int64
    assert slots.shape == weights.shape == (c.B, c.T, c.H, c.k)
    found = {"read": torch.cat([out.read for out in parts], dim=1), "keys": parts[-1].keys, "values": parts[-1].values}
    assert not out.value_loss.requires_grad
    assert not out.address_loss.requires_grad

    on_weights = drawn["d_weights"].gather(-1, slots.flatten(2)).view_as(weights)
    total = sum((drawn[f"d_{name}"] * found[name]).sum() for name in c.outputs if name != "weights")
    if "weights" in c.outputs:
        total = total + (on_weights * weights).sum()
    wanted = [x[name] for name in c.inputs]
    if total.requires_grad:
        gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    else:
        gradients = tuple(torch.zeros_like(tensor) for tensor in wanted)
    by_slot = slots.sort(-1)
    found |= {
        "slots": by_slot.values,
        "weights": weights.gather(-1, by_slot.indices),
        "value_loss": value_loss / max(n_pairs, 1),
        "address_loss": address_loss / max(n_chunks, 1),
    }
    found |= {f"grad_{name}": gradient for name, gradient in zip(c.inputs, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}


def errors(got: dict[str, Tensor], want: dict[str, Tensor], floor: float) -> dict[str, float]:
    """Largest difference of each tensor over its largest expected entry, or over ``floor``."""
    found = {}
    for name, expected in want.items():
        if name != "slots" and expected.numel():
            difference = (got[name].double() - expected).abs().max().item()
            found[name] = difference / max(expected.abs().max().item(), floor)
    return found


def require_equal(
    got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype, rounding: dict[str, float] | None = None
) -> None:
    """Assert that ``got`` is ``want`` to the bounds above; rounding: the reference's own float32 errors."""
    assert got.keys() == want.keys()
    assert all(got[name].shape == want[name].shape and got[name].dtype in (dtype, torch.int64) for name in want)
    assert torch.equal(got["slots"], want["slots"]), "other slots"
    for name, error in errors(got, want, FLOOR[dtype]).items():
        bound = 1e-10 if dtype == torch.float64 else max(2e-5, 20 * rounding[name])
        # Written so that NaN fails.
        assert error <= bound, f"{name}: off by {error:.3g} of its largest entry, allowed {bound:.3g}"


@torch.no_grad()
def margin(c: Configuration) -> float:
    """How near the float64 reference comes to a jump: the smallest gap between a chosen score and the best left out,
    of sub-keys and of pairs, and between a clipped gradient's entry and +-1, each relative to the numbers compared."""
    drawn = draw_inputs(c)
    mask = drawn.pop("mask", None)
    x = {name: drawn[name] for name in INPUTS if name in drawn}
    smallest = float("inf")
    for start in range(0, c.T, c.C):
        part = slice(start, start + c.C)
        now = x | {name: x[name][:, part] for name in ("q", "v", "gate") if name in x}
        keys = now["keys"] if now["keys"].ndim == 5 else now["keys"].expand(c.B, *now["keys"].shape)
        halves = now["q"].unflatten(-1, (2, 1, c.half_dim))
        by_query = keys.unsqueeze(1)
        if c.options["score"] == "idw":
            measures = -(halves - by_query).square().sum(-1)
            scale = halves.square().sum(-1) + by_query.square().sum(-1)
        else:
            measures = (halves * by_query).sum(-1)
            scale = halves.norm(dim=-1) * by_query.norm(dim=-1)
        best = measures.sort(-1, descending=True).values
        smallest = min(smallest, _gap(best / scale.amax(-1, keepdim=True).clamp(min=1), c.k))
        scores = -torch.log(1e-3 - best) if c.options["score"] == "idw" else best
        sums = (scores[..., 0, : c.k, None] + scores[..., 1, None, : c.k]).flatten(-2)
        best = sums.sort(-1, descending=True).values
        smallest = min(smallest, _gap(best / best.abs().amax(-1, keepdim=True).clamp(min=1), c.k))
        here = None if mask is None else mask[:, part]
        after = call("reference", now, here, c)
        if c.options.get("clip"):
            free = call("reference", now, here, c, clip=False)
            for name in ("keys", "values"):
                gradient = (free._asdict()[name] - x[name]) / c.options["lr"]
                smallest = min(smallest, (gradient.abs() - 1).abs().min().item())
        x = x | {"keys": after.keys, "values": after.values}
    return smallest


def _gap(best: Tensor, top_k: int) -> float:
    """Between the k-th and the next of sorted scores (...,n)."""
    if best.shape[-1] == top_k or not best.numel():
        return float("inf")
    return (best[..., top_k - 1] - best[..., top_k]).min().item()
