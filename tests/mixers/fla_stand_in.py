"""A layer that speaks the protocol of fla's layers, in plain torch, with that library's own class of caches."""

import functools
import importlib.util
import sys

import torch
from torch import nn

from mixers.base import Traits
from mixers.fla_layers import FlaLayer
from mixers.fla_layers.catalog import Argument, Source, package_folder
from mixers.fla_layers.facts import Facts
from mixers.fla_layers.options import config_class


@functools.cache
def real_cache():
    """``fla.models.cache_utils.Cache``: its file needs no triton, its package does."""
    path = package_folder().parent / "models" / "cache_utils.py"
    spec = importlib.util.spec_from_file_location("fla_cache_utils", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Cache


class Memory(nn.Module):
    """s_t = a s_{t-1} + u_t + u_{t-1} with u = W x (1 + position), y = s. Its state is changed in place, as kernels do.

    ``single_only``: like some of fla's layers, refuses more than one token behind a state.
    """

    def __init__(self, hidden_size=8, num_heads=2, decay=0.5, single_only=False, layer_idx=None):
        super().__init__()
        if hidden_size % num_heads:
            raise AssertionError("hidden_size must be divisible by num_heads")
        self.proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.register_buffer("rate", torch.tensor(decay))
        self.proj.weight._no_weight_decay = True
        self.single_only, self.layer_idx = single_only, layer_idx

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, **kwargs):
        n_sequences, n_tokens, width = hidden_states.shape
        last = past_key_values[0] if past_key_values is not None and len(past_key_values) else None
        seen = 0 if past_key_values is None else past_key_values.get_seq_length(0)
        if self.single_only and last is not None and n_tokens > 1:
            raise NotImplementedError("a single token at a time")
        real = torch.ones(n_sequences, n_tokens) if attention_mask is None else attention_mask[:, -n_tokens:]
        lengths = torch.full((n_sequences,), seen + n_tokens) if attention_mask is None else attention_mask.sum(1)
        position = lengths[:, None] - n_tokens + torch.arange(n_tokens)
        u = self.proj(hidden_states) * (1 + position)[..., None] * real[..., None]
        recurrent = torch.zeros(n_sequences, width) if last is None else last["recurrent_state"]
        previous = torch.zeros(n_sequences, width) if last is None else last["conv_state"][0]
        ys = []
        for t in range(n_tokens):
            recurrent = recurrent * self.rate + u[:, t] + previous
            previous = u[:, t]
            ys.append(recurrent)
        if last is not None:
            with torch.no_grad():
                last["recurrent_state"].copy_(recurrent)
        if past_key_values is not None:
            past_key_values.update(
                recurrent_state=recurrent, conv_state=(u[:, -1],), layer_idx=self.layer_idx, offset=n_tokens
            )
        return torch.stack(ys, 1), None, past_key_values


ARGUMENTS = (
    Argument("hidden_size", "int", 8),
    Argument("num_heads", "int", 2),
    Argument("decay", "float", 0.5),
    Argument("single_only", "bool", False),
    Argument("layer_idx", "int | None", None),
)


def stand_in(**facts):
    """The adapter's class around :class:`Memory`, allowed on the CPU."""

    class StandIn(FlaLayer):
        name = "fla:stand_in"
        Config = config_class("StandInConfig", ARGUMENTS, set(), {})
        traits = Traits(state_growth="constant", resumable=facts.get("continues") != "never")
        layer_source = Source("stand_in", "stand_in", "Memory")

        @classmethod
        def load_class(cls):
            return Memory

        @classmethod
        def load_cache(cls):
            return real_cache()

    StandIn.facts = Facts(**facts)
    return StandIn
