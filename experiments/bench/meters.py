"""What a layer is, counted and not timed: parameters, bytes of its real state, FLOPs against torch's counter."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from experiments.bench.layers import Bench, Measured
from experiments.cost import TRAINING_FLOPS, cost_contexts
from experiments.device import Compute
from mixers.base import Mixer, state_bytes
from mixers.contract.cost import BAG_FLOPS


def sizes(layer: Mixer) -> dict[str, Any]:
    """params, slow_weight_bytes (theirs), buffer_bytes (what is saved beside them), active_params_per_token."""
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    saved = set(layer.state_dict())
    buffers = [buffer for name, buffer in layer.named_buffers() if name in saved]
    return {
        "params": sum(parameter.numel() for parameter in trained),
        "slow_weight_bytes": sum(parameter.numel() * parameter.element_size() for parameter in trained),
        "buffer_bytes": sum(buffer.numel() * buffer.element_size() for buffer in buffers),
        "active_params_per_token": layer.active_params_per_token(),
    }


class StateMeter:
    """Bytes of a layer's state by T, from the tensors of real states."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.rows: dict[int, dict[str, int]] = {}
        self.shared_bytes: int | None = None

    def measure(self, n_tokens: int) -> Any:
        """The state after ``n_tokens``, which is kept in ``rows`` as bytes, and by the first call also in a batch of 2.

        bytes: the larger of those after T-1 and T tokens, as a memory that writes in chunks holds a full queue just
        before a chunk ends; what a memory leaves out because nothing changed it counts too. stored: what the tensors
        of the state after T hold.
        """
        layer = self.bench.layer
        before, after = self.bench.state_after(n_tokens)
        both = [layer.full_state_bytes(state) for state in (before, after)]
        self.rows[n_tokens] = {"tokens": n_tokens, "bytes": max(both), "stored_bytes": state_bytes(after)}
        if self.shared_bytes is None:
            _, two = self.bench.state_after(n_tokens, batch=2)
            self.shared_bytes = 2 * both[1] - layer.full_state_bytes(two)
        return after

    def summary(self) -> dict[str, Any]:
        """state_bytes_per_token: growth between the two largest T. state_bytes_fixed: the rest at the largest.

        state_bytes_shared: the part that does not double with the batch.
        """
        measured = [self.rows[n_tokens] for n_tokens in sorted(self.rows)]
        found: dict[str, Any] = {"state": measured, "state_bytes_shared": self.shared_bytes}
        found |= dict.fromkeys(("state_bytes", "state_bytes_per_token", "state_bytes_fixed"))
        if not measured:
            return found
        last = measured[-1]
        found["state_bytes"] = last["bytes"]
        if len(measured) > 1:
            step = last["tokens"] - measured[-2]["tokens"]
            found["state_bytes_per_token"] = (last["bytes"] - measured[-2]["bytes"]) / step
            found["state_bytes_fixed"] = last["bytes"] - found["state_bytes_per_token"] * last["tokens"]
        return found


def flops(measured: Measured, compute: Compute, n_tokens: int, seed: int) -> dict[str, Any]:
    """FLOPs per token, by the layer's formula and as torch counts them on the readable path.

    flops_per_token: the formula, mean over the contexts 0..T-1. counted_flops_per_token: of one call on T tokens: the
    chunked forms do more than one token after the other, and full attention computes the masked half too.
    counted_train_flops_per_token: of forward and backward. train_over_forward: the ratio of the counted two, for which
    runs take 3. None where the layer does not know its FLOPs.
    """
    keys = ("flops_per_token", "train_flops_per_token", "counted_flops_per_token", "counted_train_flops_per_token")
    found: dict[str, Any] = {"flops_at_tokens": n_tokens, **dict.fromkeys((*keys, "train_over_forward"))}
    readable = Bench(measured._replace(options=_readable(measured)), compute, seed)
    formula = [readable.layer.flops_per_token(context) for context in cost_contexts(n_tokens)]
    if None in formula:
        return found
    forward, train = (
        _counted(operation, n_tokens) for operation in (readable.prefill(n_tokens), readable.train(n_tokens, 1))
    )
    mean = statistics.fmean(formula)
    return found | {
        "flops_per_token": mean,
        "train_flops_per_token": TRAINING_FLOPS * mean,
        "counted_flops_per_token": forward,
        "counted_train_flops_per_token": train,
        "train_over_forward": train / forward if forward else None,
    }


def _readable(measured: Measured) -> dict[str, Any]:
    from mixers import registry

    has_choice = "impl" in registry.get(measured.name).Config.model_fields
    return measured.options | ({"impl": "reference"} if has_choice else {})


def _counted(operation: Any, n_tokens: int) -> float:
    with FlopCounterMode(display=False, custom_mapping=BAG_FLOPS | BACKWARD_FLOPS) as counter:
        operation()
    return counter.get_total_flops() / n_tokens


def _bag_gradient_flops(d_out_shape: Any, index_shape: Any, *_: Any, **__: Any) -> int:
    """Each access adds its weight times a row of width V."""
    return 2 * index_shape[0] * d_out_shape[1]


def _bag_weight_flops(d_out_shape: Any, table_shape: Any, index_shape: Any, *_: Any, **__: Any) -> int:
    """The derivative of each weight is an inner product of width V."""
    return 2 * index_shape[0] * table_shape[1]


def _conv_gradient_flops(d_out_shape: Any, x_shape: Any, w_shape: Any, *rest: Any, **_: Any) -> int:
    """As many as the forward pass for each of input and weight; torch's own formula forgets groups at the weight."""
    transposed, output_mask = rest[4], rest[7]
    return conv_flop_count(x_shape, w_shape, d_out_shape, transposed=transposed) * sum(output_mask[:2])


BACKWARD_FLOPS = {
    torch.ops.aten.convolution_backward: _conv_gradient_flops,
    torch.ops.aten._embedding_bag_backward: _bag_gradient_flops,
    torch.ops.aten._embedding_bag_per_sample_weights_backward: _bag_weight_flops,
}
