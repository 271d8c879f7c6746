"""Check the Triton implementation against the readable one, then time it: python -m mixers.fwpkm.gpu_check [--json].

With TRITON_INTERPRET=1 and no GPU the check runs in triton's interpreter, in float64, and nothing is timed.
Exit code 1 when a check fails. Beside the measured time of each step of a chain stands the predicted one, PREDICTED.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import click
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mixers.fwpkm.reference import ChunkOptions
from mixers.fwpkm.reference import write_chunks as write_readable
from mixers.fwpkm.triton_chunks import write_chunks as write_triton
from mixers.kernels.barrier import timed_meetings
from mixers.kernels.weighted_rows import weighted_rows
from mixers.product_keys import read

CASES = [
    {},
    {"update_scale": "released", "lookahead": 2, "temperature": 0.5, "masked": True},
    {"update_scale": "released", "lookahead": 0, "score": "dot", "heads": 1},
    {"address_weight": 0.0, "masked": True, "gated": False},
    {"scope": "sequence", "lr": 0.7, "address_weight": 0.3, "frozen": True},
    {"scope": "sequence", "update_scale": "released", "masked": True, "score": "dot"},
]


# Predicted milliseconds of every step of the chains, all chunks together, at the timed sizes on an H100 (float32,
# n=512, H=1, k=8, K=V=512, one shared memory): bytes over 3 TB/s of memory or 5.5 TB/s of L2 cache, 500 TFLOP/s for
# float16 products, and about 1 us for each meeting of the programs.
PREDICTED = {
    # 8 x 4096 tokens, C=512: 8 chunks of 4096 queries.
    "train_steps": {
        "key_chain.rank": 0.16,  # 3 x 2.1 GFLOP a chunk, 134 MB of parts from the L2 cache
        "key_chain.address": 0.10,  # 4 tiles of 8 half queries a program, 3 us each
        "key_chain.pull": 0.20,  # 3 x 2.1 GFLOP a chunk, 67 MB of parts from the L2 cache
        "key_chain.step": 0.04,
        "value_chain.read": 0.25,  # 92 MB a chunk
        "value_chain.step": 0.12,  # 11,000 of 17,000 rows, those that are read again: 46 MB a chunk
        "value_chain_backward.token": 0.35,  # 131 MB a chunk
        "value_chain_backward.step": 0.12,  # 46 MB a chunk
        "key_chain_backward.direction": 0.10,  # 67 MB of a chunk from the L2 cache, each at most once a processor
        "key_chain_backward.use": 0.04,  # 67 million comparisons a chunk
        "key_chain_backward.gradient": 0.13,  # 134 MB of a chunk from the L2 cache
        "key_chain_backward.pull": 0.16,
        "key_chain_backward.step": 0.04,
    },
    # 131072 tokens, C=512: 256 chunks of 512 queries, where waits outweigh bytes; each chain as if alone.
    "prefill_128k_steps": {
        "key_chain.rank": 1.15,
        "key_chain.address": 1.0,
        "key_chain.move": 1.3,  # a meeting, four loads that depend on one another, 8 MB of q a chunk from the L2 cache
        "value_chain.read": 0.95,
        "value_chain.step": 1.3,
    },
}


def options_of(**changes) -> ChunkOptions:
    """The paper's options but for ``changes``."""
    usual = {
        "chunk_size": 512, "top_k": 8, "lookahead": 1, "lr": 1.0, "weight_decay": 0.0, "score": "idw",
        "temperature": 1.0, "address_weight": 1.0, "value_loss_to_keys": False, "clip": False, "update_scale": "paper",
    }  # fmt: skip
    return ChunkOptions(**(usual | changes))


def draw(
    n_memories: int, n_rows: int, n_tokens: int, heads: int, key_dim: int, n: int, value_dim: int,
    dtype: torch.dtype, device: str, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Random q, v, gate, keys and values; the queries lie near the keys, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parts = {
        "q": normal(n_memories, n_rows, n_tokens, heads, key_dim) * key_dim**-0.5,
        "v": normal(n_memories, n_rows, n_tokens, value_dim),
        "gate": torch.rand(n_memories, n_rows, n_tokens, generator=generator, dtype=torch.float64),
        "keys": normal(n_memories, heads, 2, n, key_dim // 2) * key_dim**-0.5,
        "values": normal(n_memories, n * n, value_dim) * value_dim**-0.5,
    }
    return {name: part.to(device=device, dtype=dtype).requires_grad_() for name, part in parts.items()}


def compare(case: dict, sizes: dict[str, int], dtype: torch.dtype, device: str) -> dict[str, float]:
    """Largest difference from the float64 reference over the reference's largest entry, per output and gradient.

    ``slots``: the share of accesses that differ.
    """
    case = dict(case)
    scope, masked, gated = case.pop("scope", "shared"), case.pop("masked", False), case.pop("gated", True)
    heads, frozen = case.pop("heads", 2), case.pop("frozen", False)
    lead = (sizes["B"], 1) if scope == "sequence" else (1, sizes["B"])
    options = options_of(chunk_size=sizes["C"], top_k=sizes["k"], **case)
    drawn = draw(*lead, sizes["T"], heads, sizes["K"], sizes["n"], sizes["V"], torch.float64, device)
    mask = torch.ones(*lead, sizes["T"], dtype=torch.bool, device=device)
    mask[..., : sizes["T"] // 5] = False
    if not gated:
        del drawn["gate"]
    # The same float32 numbers for both, so that only the arithmetic differs.
    drawn = {name: part.detach().to(dtype).double().requires_grad_() for name, part in drawn.items()}
    results = []
    for write, width in ((write_readable, torch.float64), (write_triton, dtype)):
        parts = {name: part.detach().to(width).requires_grad_() for name, part in drawn.items()}
        if frozen:
            parts["keys"].requires_grad_(False), parts["values"].requires_grad_(False)
        trained = {name: part for name, part in parts.items() if part.requires_grad}
        out = write(
            parts["q"],
            parts["v"],
            parts.get("gate"),
            parts["keys"],
            parts["values"],
            mask if masked else None,
            options,
        )
        if write is write_triton:
            out = out._replace(values=out.values.table())
        generator = torch.Generator().manual_seed(1)
        loss = 0.0
        for tensor in (out.read,) if frozen else (out.read, out.keys, out.values, out.weights):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(device)
            loss = loss + (tensor.double() * noise).sum()
        gradients = torch.autograd.grad(loss, list(trained.values()))
        found = dict(zip((f"d_{name}" for name in trained), gradients, strict=True))
        results.append(out._asdict() | found)
    want, got = results
    errors = {"slots": (want.pop("slots") != got.pop("slots")).double().mean().item()}
    for name, expected in want.items():
        assert torch.isfinite(got[name]).all(), f"{case}: {name} is not finite"
        largest = max(expected.abs().max().item(), 1e-30)
        errors[name] = (got[name].double() - expected).abs().max().item() / largest
    return errors


def compare_static(dtype: torch.dtype, device: str) -> dict[str, float]:
    """:func:`weighted_rows` against the readable read, as :func:`compare`; one slot is read by every token."""
    generator = torch.Generator().manual_seed(2)
    slots = torch.randint(0, 50, (2, 37, 5), generator=generator)
    slots[..., 0] = 7
    slots = slots.to(device)
    drawn = [
        torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((50, 33), (37, 5), (37, 33))
    ]
    values, weights, noise = (part.to(device=device, dtype=dtype) for part in drawn)
    results = []
    for operation, width in ((read, torch.float64), (weighted_rows, dtype)):
        table, share = values.to(width).requires_grad_(), weights.to(width).requires_grad_()
        out = operation(table, slots, share)
        results.append([out, *torch.autograd.grad((out * noise.to(width)).sum(), [table, share])])
    pairs = zip(("read", "d_values", "d_weights"), *results, strict=True)
    return {name: ((a - b.double()).abs().max() / a.abs().max()).item() for name, a, b in pairs}


def milliseconds(operation: Callable[[], object], repeats: int = 10) -> float:
    """Median time of ``operation`` on the device, by events, after three calls.

    Each timed call follows another, so that the device need not wait for the host's first launch.
    """
    for _ in range(3):
        operation()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        operation()
        start.record()
        operation()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def host_milliseconds(operation: Callable[[], object], repeats: int = 5) -> float:
    """Median time until a call returns, the device idle before it: what the host does."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        operation()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1000


def captured(operation: Callable[[], object]) -> Callable[[], object]:
    """``operation`` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            operation()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operation()
    return graph.replay


def kernel_times(operation: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Device time of each kernel of one call: launches and milliseconds, longest first."""
    operation()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        operation()
        torch.cuda.synchronize()
    rows = {
        event.key[:60]: {"launches": event.count, "ms": round(event.self_device_time_total / 1000, 4)}
        for event in seen.key_averages()
        if event.self_device_time_total > 0 and event.device_type == torch.autograd.DeviceType.CUDA
    }
    return dict(sorted(rows.items(), key=lambda item: -item[1]["ms"])[:24])


def step_times(operation: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Milliseconds between the meetings of the chains' programs, summed over the chunks, by "kernel.step"."""
    with timed_meetings():
        operation()
    torch.cuda.synchronize()
    with timed_meetings() as found:
        operation()
        torch.cuda.synchronize()
    return {f"{kernel}.{step}": {"ms": round(ms, 4)} for kernel, steps in found.items() for step, ms in steps.items()}


def extra_bytes(operation: Callable[[], object]) -> int:
    """Device memory that a call needs on top of what is allocated when it starts, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    operation()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def timings() -> dict[str, object]:
    """Training step, prefill and static read at the paper's sizes; every part is printed to stderr as it is known."""
    found: dict[str, object] = {"device": torch.cuda.get_device_name()}
    # Drawn on the device: the paper's table has 134 million entries.
    torch.manual_seed(0)
    keys = torch.randn(1, 1, 2, 512, 256, device="cuda") * 512**-0.5
    values = torch.randn(1, 512**2, 512, device="cuda") * 512**-0.5
    for part in (_time_copy, _time_training, _time_prefill, _time_static_read):
        for name, value in part(keys, values):
            for step, predicted in PREDICTED.get(name, {}).items():
                value.setdefault(step, {})["predicted_ms"] = predicted
            found[name] = value
            print(f"{name}: {value}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    return found


Measured = Iterator[tuple[str, object]]


def _tokens(n_rows: int, n_tokens: int) -> list[Tensor]:
    """q, v and gate of the paper's widths."""
    q = torch.randn(1, n_rows, n_tokens, 1, 512, device="cuda") * 512**-0.5
    return [q, torch.randn(1, n_rows, n_tokens, 512, device="cuda"), torch.rand(1, n_rows, n_tokens, device="cuda")]


def _time_copy(keys: Tensor, values: Tensor) -> Measured:
    target = torch.empty_like(values)
    yield "copy_TB_per_s", 2 * values.nbytes / milliseconds(lambda: target.copy_(values)) / 1e9


def _time_training(keys: Tensor, values: Tensor) -> Measured:
    inputs = [part.requires_grad_() for part in _tokens(8, 4096)]
    cotangent = torch.randn(1, 8, 4096, 512, device="cuda")

    def train() -> tuple[Tensor, ...]:
        """As the layer does it when no state goes on."""
        read = write_triton(*inputs, keys, values, None, options_of(), goes_on=False).read
        return torch.autograd.grad(read, inputs, cotangent)

    def train_on() -> tuple[Tensor, ...]:
        """With the memory after it."""
        out = write_triton(*inputs, keys, values, None, options_of())
        out.values.table()
        return torch.autograd.grad(out.read, inputs, cotangent)

    @torch.no_grad()
    def infer() -> object:
        return write_triton(*inputs, keys, values, None, options_of()).values.table()

    yield "forward_ms", milliseconds(infer)
    yield "train_ms", milliseconds(train)
    yield "train_host_ms", host_milliseconds(train)
    yield "train_with_table_ms", milliseconds(train_on)
    yield "train_extra_GB", extra_bytes(train) / 1e9
    yield "train_with_table_extra_GB", extra_bytes(train_on) / 1e9
    yield "train_kernels", kernel_times(train)
    yield "train_steps", step_times(train)
    yield "deterministic", all(torch.equal(a, b) for a, b in zip(train(), train(), strict=True))
    yield "forward_graph_ms", milliseconds(captured(infer))
    yield "train_graph_ms", milliseconds(captured(train))
    yield "train_with_table_graph_ms", milliseconds(captured(train_on))


def _time_prefill(keys: Tensor, values: Tensor) -> Measured:
    inputs = _tokens(1, 131072)

    @torch.no_grad()
    def infer() -> object:
        return write_triton(*inputs, keys, values, None, options_of()).values.table()

    yield "prefill_128k_ms", milliseconds(infer, repeats=5)
    yield "prefill_128k_host_ms", host_milliseconds(infer)
    yield "prefill_128k_extra_GB", extra_bytes(infer) / 1e9
    yield "prefill_128k_kernels", kernel_times(infer)
    yield "prefill_128k_steps", step_times(infer)
    yield "prefill_128k_graph_ms", milliseconds(captured(infer), repeats=5)


def _time_static_read(keys: Tensor, values: Tensor) -> Measured:
    """8 x 4096 tokens, H=4, k=8, forward and backward into the weights and the table, whose gradient is dense."""
    table = values.clone().requires_grad_()
    slots = torch.randint(0, 512**2, (1, 32768, 32), device="cuda")
    weights = torch.softmax(torch.randn(1, 32768, 32, device="cuda"), -1).requires_grad_()
    cotangent = torch.randn(1, 32768, 512, device="cuda")

    def step(operation: Callable[[Tensor, Tensor, Tensor], Tensor]) -> object:
        return torch.autograd.grad(operation(table, slots, weights), [table, weights], cotangent)

    # Every row read once forward and once backward, and its gradient written; the tokens' rows once each way.
    yield "static_GB", (3 * table.nbytes + 2 * cotangent.nbytes) / 1e9
    yield "static_weighted_rows_ms", milliseconds(lambda: step(weighted_rows))
    yield "static_embedding_bag_ms", milliseconds(lambda: step(read))
    yield "static_weighted_rows_kernels", kernel_times(lambda: step(weighted_rows))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("--check-only", is_flag=True, help="no timing")
def main(as_json: bool, check_only: bool) -> None:
    """Check mixers.fwpkm.triton_chunks against the reference; on a GPU also time it."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.float32) if on_gpu else ("cpu", torch.float64)
    bound = 2e-5 if on_gpu else 1e-10
    sizes = {"B": 3, "T": 300, "K": 64, "n": 45, "V": 96, "k": 5, "C": 64}
    if not on_gpu:
        sizes = {"B": 2, "T": 7, "K": 6, "n": 6, "V": 5, "k": 3, "C": 3}
    found: dict[str, object] = {"bound": bound, "checks": []}
    failed = False
    for case in CASES:
        errors = compare(case, sizes, dtype, device)
        failed |= not max(errors.values()) <= bound
        found["checks"].append({"case": case, "errors": errors})
    errors = compare_static(dtype, device)
    failed |= not max(errors.values()) <= bound
    found["checks"].append({"case": "static", "errors": errors})
    if on_gpu and not check_only:
        found["timings"] = timings()
    if as_json:
        print(json.dumps(found))
    else:
        for check in found["checks"]:
            print(check["case"], {name: f"{error:.1e}" for name, error in check["errors"].items()})
        for name, value in found.get("timings", {}).items():
            rows = value.items() if isinstance(value, dict) else []
            print(name, "" if rows else value, *(f"\n  {kernel}: {row}" for kernel, row in rows))
        print("FAILED" if failed else "all checks passed", f"(bound {bound:g})")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
