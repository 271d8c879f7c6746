"""What a model costs: bytes of its real state, FLOPs, measured speed and memory."""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from pathlib import Path

import torch

from experiments.backbone import Backbone, BackboneState
from experiments.device import Compute
from experiments.turns import Turns
from mixers.base import Mixer, state_bytes

N_FLOP_CONTEXTS = 33
# Of a training step, relative to its forward pass.
TRAINING_FLOPS = 3.0
N_DECODE_TOKENS = 16
N_PREFILL_REPEATS = 3


def measure_cost(model: Backbone, n_tokens: int, compute: Compute, turns: Turns | None = None) -> dict[str, float]:
    """Costs by name, for one sequence of ``n_tokens`` tokens. While it times, other trainings of ``turns`` wait.

    state_bytes: of the model's real state, the larger of those after T-1 and after T tokens: a memory that writes in
        chunks holds a full queue just before a chunk ends. A memory that stores only what was written counts whole.
    state_bytes_per_token: growth from T to 2T tokens, per token. state_bytes_fixed: the rest of state_bytes.
    state_bytes_shared: the part that does not double with the batch.
    params: trained parameters (slow weights), not part of the state. slow_weight_bytes: theirs, as stored.
    active_params_per_token: those that one token reads, see :func:`active_params`.
    flops_per_token: forward, mean over the contexts. train_flops_per_token: three times that, the rule for matrix
        products, whose backward has two for each; ``mixlab bench`` holds it against torch's counter.
    prefill_tokens_per_s: one call on T tokens, batch 1, median. decode_ms_per_token: one-token calls after T, median.

    What can't be known has no entry: FLOPs of a mixer that doesn't know them; state and decoding of a model with a
    mixer that keeps no state of its past.
    """
    was_training = model.training
    model.eval()
    try:
        cost = _state_cost(model, n_tokens, compute) if model.resumable else {}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        cost["params"] = float(sum(parameter.numel() for parameter in trained))
        cost["slow_weight_bytes"] = float(sum(parameter.numel() * parameter.element_size() for parameter in trained))
        cost["active_params_per_token"] = float(active_params(model))
        flops = [model.flops_per_token(context) for context in cost_contexts(n_tokens)]
        if None not in flops:
            cost["flops_per_token"] = statistics.fmean(flops)
            cost["train_flops_per_token"] = TRAINING_FLOPS * cost["flops_per_token"]
        with (turns or Turns()).alone():
            return cost | _speed(model, n_tokens, compute)
    finally:
        model.train(was_training)


def active_params(model: Backbone) -> int:
    """Trained parameters that the logits of one token depend on: all but unread rows of tables.

    Tables are those that the mixers declare, the embedding unless it is also the output projection, and learned
    positions, of which a token reads one row.
    """
    unread = sum(
        sum(parameter.numel() for parameter in mixer.parameters() if parameter.requires_grad)
        - mixer.active_params_per_token()
        for mixer in model.named_mixers().values()
    )
    tables = [] if model.head is None else [model.embedding.weight]
    if model.config.positions == "learned":
        tables.append(model.positions.weight)
    unread += sum(table.numel() - table.shape[1] for table in tables)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) - unread


def cost_contexts(n_tokens: int) -> list[int]:
    """The contexts below ``n_tokens`` over which FLOPs per token are averaged, evenly spaced, both ends included."""
    return torch.linspace(0, n_tokens - 1, min(N_FLOP_CONTEXTS, n_tokens)).round().int().tolist()


@torch.no_grad()
def _state_cost(model: Backbone, n_tokens: int, compute: Compute) -> dict[str, float]:
    longest = 2 * n_tokens
    if model.config.positions == "learned":
        longest = min(longest, model.config.max_positions)

    def measured(n: int, batch_size: int = 1) -> int:
        tokens = torch.zeros(batch_size, n, dtype=torch.int64, device=compute.device)
        with compute.autocast():
            return full_state_bytes(model, model(tokens, return_state=True).state)

    full, before, later = measured(n_tokens), measured(n_tokens - 1), measured(longest)
    per_token = (later - full) / (longest - n_tokens) if longest > n_tokens else (full - measured(1)) / (n_tokens - 1)
    peak = max(full, before)
    return {
        "state_bytes": float(peak),
        "state_bytes_per_token": per_token,
        "state_bytes_fixed": peak - per_token * n_tokens,
        "state_bytes_shared": float(2 * full - measured(n_tokens, batch_size=2)),
        "state_context_tokens": float(n_tokens),
    }


def full_state_bytes(model: Backbone, state: BackboneState) -> int:
    """Bytes of all sub-layers' states, each by its mixer's ``full_state_bytes``.

    The counter of the backbone is bookkeeping of 8 bytes, equal for all arms: left out.
    """
    total = 0
    for block, states in zip(model.blocks, state.blocks, strict=True):
        for name, part in states.items():
            sublayer = block.sublayers[name]
            total += sublayer.full_state_bytes(part) if isinstance(sublayer, Mixer) else state_bytes(part)
    return total


@torch.no_grad()
def _speed(model: Backbone, n_tokens: int, compute: Compute) -> dict[str, float]:
    tokens = torch.zeros(1, n_tokens, dtype=torch.int64, device=compute.device)

    def timed(n: int, state: object) -> tuple[float, object]:
        compute.synchronize()
        started = time.perf_counter()
        with compute.autocast():
            out = model(tokens[:, :n], state, return_state=model.resumable)
            model.logits(out.hidden[:, -1:])
        compute.synchronize()
        return time.perf_counter() - started, out.state

    timed(n_tokens, None)  # warm-up
    prefill = statistics.median(timed(n_tokens, None)[0] for _ in range(N_PREFILL_REPEATS))
    cost = {"prefill_tokens_per_s": n_tokens / prefill}
    if not model.resumable:
        return cost
    if model.config.positions == "learned" and n_tokens + N_DECODE_TOKENS > model.config.max_positions:
        return cost
    _, state = timed(n_tokens, None)
    seconds = []
    for _ in range(N_DECODE_TOKENS):
        one, state = timed(1, state)
        seconds.append(one)
    cost["decode_ms_per_token"] = 1e3 * statistics.median(seconds)
    return cost


class PeakMemory:
    """Peak memory from construction on: the device's allocator on CUDA, the process's resident set elsewhere."""

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        if compute.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(compute.device)
            return
        # Linux forgets the process's high-water mark when told so; elsewhere it covers the process's whole life.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        if self.compute.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.compute.device)
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
