"""The operations that the benchmark times: a call without arguments for every case."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.bench.case import Case
from experiments.bench.dense import write_densely
from experiments.bench.floor import unavoidable_work
from experiments.bench.package import package_decode, package_layer
from mixers import table_rows
from mixers.fwpkm import FastWeightPKM, FastWeightPKMConfig, fast_weight_pkm

Operation = Callable[[], object]


class Inputs(NamedTuple):
    """q (B,T,H,K), v (B,T,V), gate (B,T), keys (H,2,n,K/2), values (N,V): random, queries as near as trained ones."""

    q: Tensor
    v: Tensor
    gate: Tensor
    keys: Tensor
    values: Tensor


def draw(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    """Inputs of the function, the same for all implementations of a size and seed."""
    generator = torch.Generator(case.device).manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device, dtype=dtype)

    return Inputs(
        normal(case.batch, case.tokens, 1, case.key_dim) * case.key_dim**-0.5,
        normal(case.batch, case.tokens, case.value_dim),
        torch.rand(case.batch, case.tokens, generator=generator, device=case.device, dtype=dtype),
        normal(1, 2, case.n, case.key_dim // 2) * case.key_dim**-0.5,
        normal(case.n**2, case.value_dim) * case.value_dim**-0.5,
    )


def reads(case: Case, inputs: Inputs) -> Tensor:
    """What all tokens read (B,T,V), by the case's implementation."""
    if case.impl == "dense":
        return write_densely(*inputs, chunk_size=case.chunk, top_k=case.top_k, scope=case.scope)[0]
    return fast_weight_pkm(*inputs, chunk_size=case.chunk, top_k=case.top_k, scope=case.scope, impl=case.impl).read


class StaticInputs(NamedTuple):
    """table (N,V), slots (S,J) int64 uniform over the rows, weights (S,J), cotangent (S,V)."""

    table: Tensor
    slots: Tensor
    weights: Tensor
    cotangent: Tensor


def draw_static(case: Case, dtype: torch.dtype = torch.float32) -> StaticInputs:
    """Inputs of a static memory's read, the same for all implementations of a size and seed."""
    generator = torch.Generator(case.device).manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device, dtype=dtype)

    accesses = (case.n_tokens_total, case.top_k)
    return StaticInputs(
        normal(case.n**2, case.value_dim) * case.value_dim**-0.5,
        torch.randint(case.n**2, accesses, generator=generator, device=case.device),
        torch.softmax(normal(*accesses), -1),
        normal(case.n_tokens_total, case.value_dim),
    )


def static_step(impl: str, inputs: StaticInputs) -> tuple[Tensor, ...]:
    """The read of a static memory, and its derivatives with respect to the table and the weights."""
    table, weights = (part.detach().requires_grad_() for part in (inputs.table, inputs.weights))
    read = table_rows.sum_rows(table, inputs.slots, weights, impl)
    return read.detach(), *torch.autograd.grad(read, [table, weights], inputs.cotangent)


class Workbench:
    """Prepares operations, and shares what cases of one size have in common: the table is large."""

    def __init__(self) -> None:
        self._drawn: tuple[object, object] = (None, None)

    def _shared(self, key: object, make: Callable[[], Any]) -> Any:
        """The last thing made, if its ``key`` is the same; only one is kept."""
        if self._drawn[0] != key:
            self._drawn = (None, None)
            self._drawn = (key, make())
        return self._drawn[1]

    def prepare(self, case: Case) -> Operation:
        """The operation of ``case``, ready to be called any number of times."""
        if case.scene in ("prefill", "train", "scopes"):
            return self._function(case)
        if case.scene == "static":
            inputs = draw_static(case)
            return lambda: static_step(case.impl, inputs)
        return self._layer(case)

    def _function(self, case: Case) -> Operation:
        size = (case.n, case.batch, case.tokens, case.key_dim, case.value_dim, case.device, case.seed)
        inputs = self._shared(size, lambda: draw(case))
        if case.impl == "floor":
            with torch.no_grad():
                slots = fast_weight_pkm(
                    *inputs, chunk_size=case.chunk, top_k=case.top_k, scope=case.scope, impl="sparse"
                ).slots
            n_memories = case.batch if case.scope == "sequence" else 1
            return unavoidable_work(inputs.q, inputs.keys, inputs.values, slots, case.chunk, n_memories, case.backward)
        if not case.backward:
            return torch.no_grad()(lambda: reads(case, inputs))
        trained = [part.detach().requires_grad_() for part in inputs[:3]]
        cotangent = torch.ones_like(inputs.v)

        def train() -> object:
            return torch.autograd.grad(reads(case, Inputs(*trained, *inputs[3:])), trained, cotangent)

        return train

    def _layer(self, case: Case) -> Operation:
        """The whole layer, D = V: a call on T tokens, or one token after half a chunk or at the end of one."""
        d_model = case.value_dim
        generator = torch.Generator(case.device).manual_seed(case.seed)
        x = torch.randn(case.batch, case.tokens, d_model, generator=generator, device=case.device)
        is_decode = case.scene.startswith("decode")
        if case.impl == "package":
            layer = package_layer(case, d_model)
            if is_decode:
                return package_decode(layer, x[:, :-1], x[:, -1:])
            return _call_or_train(layer, x, case.backward)
        layer = self._our_layer(case, d_model)
        if not is_decode:
            return _call_or_train(lambda tokens: layer(tokens).y, x, case.backward, list(layer.parameters()))
        with torch.no_grad():
            state = layer(x[:, :-1], return_state=True).state
        return torch.no_grad()(lambda: layer(x[:, -1:], state, return_state=True))

    def _our_layer(self, case: Case, d_model: int) -> FastWeightPKM:
        config = FastWeightPKMConfig(
            d_model=d_model,
            key_dim=case.key_dim,
            value_dim=case.value_dim,
            n_subkeys=case.n,
            top_k=case.top_k,
            chunk_size=case.chunk,
            scope=case.scope,
        )

        def build() -> FastWeightPKM:
            with torch.random.fork_rng():
                torch.manual_seed(case.seed)
                return FastWeightPKM(config).to(case.device)

        # The same weights and table under another implementation.
        layer = copy.copy(self._shared((config, case.device, case.seed), build))
        layer.config = FastWeightPKMConfig(**(config.model_dump() | {"impl": case.impl}))
        return layer


def _call_or_train(
    layer: Callable[[Tensor], Tensor], x: Tensor, backward: bool, parameters: list[Tensor] | None = None
) -> Operation:
    if not backward:
        return torch.no_grad()(lambda: layer(x))
    if parameters is None:
        parameters = list(layer.parameters())
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(layer(x).sum(), [x, *parameters], allow_unused=True)
