"""What the layers of flash-linear-attention 0.6 can do, read from each ``forward``: no signature tells it.

A table, as there is no rule: what continues from a cache, how many tokens at a time, what a padding mask does.
Where nothing stands the layer is a plain recurrence: a state of constant size, from which any number of tokens
continues, and left padding taken out of the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Facts:
    """growth: of the state with the tokens seen; ``window_size``: ``window`` where that option is set, else ``linear``.

    continues: from a state with ``any`` number of tokens in a call; ``single`` tokens only, so that we hand over one
        after the other; ``never``: the layer takes and gives no state.
    inference_only: a state is only taken or given with gradients off (``no_grad``), or in evaluation mode (``eval``).
    mask: left padding is understood; ``stateless``: in calls without a state only; ``none``: not at all.
    spans_past: a mask covers the tokens already seen as well, and single tokens behind a state need one.
    dtypes: ``half``, where the kernel takes float16 and bfloat16 only.
    needs: packages without which the layer can't be built. speeds_up: without it fla runs a slow loop of its own.
    gated_backward: gradients go through a kernel that is wrong with some triton on Hopper, see implementations.py, and
        what mends it: ``tilelang`` or another triton, or another ``triton`` only.
    noisy: draws random numbers while it trains.
    fixed: constructor arguments that aren't options here, since only these values make a layer that stands alone.
    defaults: for arguments that have none of use.
    note: what a reader should know, for listings.
    """

    growth: Literal["constant", "linear", "window", "window_size", "none"] = "constant"
    continues: Literal["any", "single", "never"] = "any"
    inference_only: Literal["", "no_grad", "eval"] = ""
    mask: Literal["full", "stateless", "none"] = "full"
    spans_past: bool = False
    dtypes: Literal["float", "half"] = "float"
    needs: tuple[str, ...] = ()
    speeds_up: str = ""
    gated_backward: Literal["", "tilelang", "triton"] = ""
    noisy: bool = False
    fixed: Mapping[str, object] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    note: str = ""


def _flash(growth: str = "window_size", **more: object) -> Facts:
    """Attention on the kernels of flash-attn."""
    return Facts(growth=growth, dtypes="half", needs=("flash_attn",), **more)


FACTS: Mapping[str, Facts] = MappingProxyType(
    {
        "abc": Facts(
            "none",
            "never",
            note="keeps no state between calls: fla returns the slots without the sum that normalises them",
        ),
        "attn": _flash(),
        "based": Facts("none", "never", mask="none", note="keeps no state between calls"),
        "bitattn": _flash(),
        "comba": Facts(gated_backward="tilelang"),
        "cyfa": Facts(),
        "delta_net": Facts(fixed={"d_model": None}),
        "deltaformer": _flash("none", continues="never", note="keeps no state between calls"),
        "forgetting_attn": Facts("window_size", "single", spans_past=True),
        "gated_deltanet": Facts(gated_backward="tilelang"),
        "gated_deltaproduct": Facts(gated_backward="tilelang"),
        "gdn2": Facts(),
        "gla": Facts(),
        "gsa": Facts(),
        "hgrn": Facts(note="lower bound of the gates: that of a first layer, zero"),
        "hgrn2": Facts(note="lower bound of the gates: that of a first layer, zero"),
        "kda": Facts(),
        "lightnet": Facts(),
        "linear_attn": Facts(),
        "log_linear_mamba2": Facts(
            "window", "single", note="state grows with the logarithm of the tokens, up to a bound"
        ),
        "mamba": Facts(continues="single", speeds_up="mamba_ssm"),
        "mamba2": Facts(continues="single", speeds_up="mamba_ssm"),
        "mamba3": Facts(continues="single", needs=("mamba_ssm",), fixed={"device": None, "dtype": None}),
        "mesa_net": Facts(),
        "mla": _flash(),
        "moba": _flash(),
        "mom": Facts(
            continues="single",
            inference_only="no_grad",
            gated_backward="tilelang",
            note="router logits aren't passed on",
        ),
        "momentum_deltanet": Facts(mask="none", fixed={"d_model": None}),
        "multiscale_retention": Facts(),
        "nsa": _flash("linear"),
        "parallax": Facts("window_size", dtypes="half"),
        "path_attn": Facts("linear", "single", "eval", spans_past=True),
        "precond_gated_deltanet": Facts(gated_backward="tilelang"),
        "precond_kda": Facts(),
        "raven": Facts(noisy=True, note="routing noise while training, unless add_gumbel_noise=false"),
        "rebased": Facts("none", "never", mask="none", note="keeps no state between calls"),
        "rodimus_attention": Facts(fixed={"block_type": "rodimus"}),
        "rodimus_sliding_window_shared_key_attention": _flash("window"),
        "rwkv6": Facts(),
        "rwkv7": Facts(
            defaults={"num_hidden_layers": 24},
            note="always the stack's first layer: no values carried over from layer to layer",
        ),
        "stickbreaking_attn": Facts("none", "never", dtypes="half", note="keeps no state between calls"),
        "wall_attn": Facts("window_size", mask="stateless"),
        "yoco_gated_retention": Facts(gated_backward="triton"),
    }
)

# Exported by fla.layers, but no layer (B,T,D) -> (B,T,D) on its own.
NOT_MIXERS: Mapping[str, str] = MappingProxyType(
    {
        "yoco_cross_attention": "it reads keys and values that another layer builds",
        "yoco_shared_kv_builder": "it returns keys and values for other layers, no output of its own",
    }
)
