"""The mixer around a layer of flash-linear-attention."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mixers.base import Mixer, MixerOutput, ParameterOptions, Traits
from mixers.errors import UserError, nearest
from mixers.fla_layers.catalog import Source, arguments, package_folder, sources
from mixers.fla_layers.facts import FACTS, NOT_MIXERS, Facts
from mixers.fla_layers.options import FlaConfig, config_class, constructor_arguments
from mixers.fla_layers.state import FlaState, count, frozen, thawed
from mixers.implementations import FLA_INSTALL, FLA_MISSING, FLASH_ATTN_INSTALL, gated_backward_fault
from mixers.masking import zero_padding

PREFIX = "fla:"
INSTALL = {"flash_attn": FLASH_ATTN_INSTALL, "mamba_ssm": "pip install mamba-ssm"}
# What fla's own checks raise: conditions of use, which a user can mend.
REFUSALS = (AssertionError, NotImplementedError, ImportError)


class FlaLayer(Mixer):
    """y = the layer's forward(x), with its cache turned into a state.

    Shapes: x (B,T,D). The state is a :class:`~mixers.fla_layers.state.FlaState`: what the layer caches, copied where it
    would be changed in place, the tokens seen, and the padding at the left of each sequence. Its bytes are measured
    like those of any state; there is no formula, and none for FLOPs: ``flops_per_token`` is None, unknown, since the
    layer's kernels are counted by nothing.

    Options: those of the layer's constructor, under their names, with their defaults; ``d_model`` for ``hidden_size``,
    ``n_heads`` for ``num_heads``. Initial values are those of the constructor; fla's own language models draw some
    anew on top of it.

    Padding: ``mask`` may mask the left end of the sequences in the first call; in a call that asks for no state also
    the right end, where it changes nothing that is real. y is zero at padding.

    dtypes: bfloat16 is what the kernels are made for (parameters and x, or autocast); float32 goes where the layer
    takes it; float64 nowhere.

    Differences from the layer in fla: a layer that continues with single tokens only is handed the tokens of a call
    one by one; ``layer_idx`` is always 0.

    Raises:
        UserError: the library or a package that the layer needs isn't installed; the constructor refuses the options;
            x isn't on a GPU; the dtype or the mask isn't supported; a state is asked of a layer that has none.
    """

    facts: ClassVar[Facts]
    layer_source: ClassVar[Source]
    numbered: ClassVar[bool] = True  # the constructor takes ``layer_idx``, its place in a cache
    family = "fla layer"
    source = "flash-linear-attention"
    config: FlaConfig

    def __init__(self, config: FlaConfig) -> None:
        super().__init__(config)
        self.layer = self._built()

    @classmethod
    def load_class(cls) -> type[nn.Module]:
        """The library's class. Importing it needs triton."""
        if FLA_MISSING:
            raise UserError(
                f"{cls.place()}: needs the package {' and '.join(FLA_MISSING)}, not installed here; "
                f"on Linux with an NVIDIA GPU: {FLA_INSTALL}"
            )
        return getattr(importlib.import_module("fla.layers"), cls.layer_source.class_name)

    @classmethod
    def load_cache(cls) -> Any:
        """The library's class of caches."""
        return importlib.import_module("fla.models.utils").Cache

    @classmethod
    def place(cls) -> str:
        return f"mixer {cls.name!r}"

    def _built(self) -> nn.Module:
        layer = self.load_class()
        missing = [name for name in self.facts.needs if importlib.util.find_spec(name) is None]
        if missing:
            commands = "; ".join(INSTALL[name] for name in missing)
            raise UserError(
                f"{self.place()}: needs the package {' and '.join(missing)}, not installed here: {commands}"
            )
        given = constructor_arguments(self.config, {**self.facts.fixed, **({"layer_idx": 0} if self.numbered else {})})
        try:
            return layer(**given)
        except Exception as error:
            raise UserError(f"{self.place()}: fla's {layer.__name__} refuses these options: {_words(error)}") from error

    def reset_parameters(self) -> None:
        """Draw all values as the constructor does: the library has no other way."""
        fresh = self._built()
        with torch.no_grad():
            for own, new in ((self.layer.parameters(), fresh.parameters()), (self.layer.buffers(), fresh.buffers())):
                for old, value in zip(own, new, strict=True):
                    old.copy_(value)

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """No weight decay where the library marks a parameter so."""
        return {
            f"layer.{name}": ParameterOptions(weight_decay=False)
            for name, parameter in self.layer.named_parameters()
            if getattr(parameter, "_no_weight_decay", False)
        }

    @property
    def impl(self) -> str:
        """``fla``; ``fla (slow)`` where the library lacks the package of this layer's kernels and loops instead."""
        slow = self.facts.speeds_up and importlib.util.find_spec(self.facts.speeds_up) is None
        return "fla (slow)" if slow else "fla"

    @property
    def state_growth(self) -> str:
        if self.facts.growth != "window_size":
            return self.facts.growth
        return "linear" if self.config.window_size is None else "window"

    def flops_per_token(self, context: int) -> None:
        """Unknown: no formula holds for all layers, and torch's counter sees none of their kernels."""

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> FlaState | None:
        """Nothing cached yet; None for a layer that keeps no state."""
        return None if self.facts.continues == "never" else FlaState(None, count(0), None)

    def forward(
        self, x: Tensor, state: FlaState | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        with_state = return_state or state is not None
        self._require(x, with_state)
        clean = zero_padding(x, mask)
        before = FlaState(None, count(0), None) if state is None else state
        seen = int(before.seen)
        padding = self._padding(mask, before.padding, seen, with_state)
        if x.shape[1] == 0:
            return MixerOutput(x.clone(), before if return_state else None, {})

        cache = None
        # A layer that takes padding in inference only wants a cache along with it.
        if with_state or (padding is not None and self.facts.inference_only == "eval"):
            entries = () if before.cache is None else (thawed(before.cache),)
            cache = self.load_cache().from_legacy_cache(entries, seen_tokens=seen)
        y = self._called(clean, cache, seen, padding)
        after = None
        if return_state:
            after = FlaState(frozen(cache[0], x), count(seen + x.shape[1]), padding)
        return MixerOutput(zero_padding(y, mask), after, {})

    def _called(self, x: Tensor, cache: Any, seen: int, padding: Tensor | None) -> Tensor:
        """The layer on all of ``x``, or on one token after the other where it can't continue with more."""
        grows = self.state_growth != "constant"
        one_by_one = seen > 0 and (self.facts.continues == "single" or (padding is not None and grows))
        parts = x.split(1, dim=1) if one_by_one else (x,)
        ys = []
        for part in parts:
            seen += part.shape[1]
            needs_mask = padding is not None or (self.facts.spans_past and cache is not None)
            given = self._library_mask(part.shape[0], seen, padding, x.device) if needs_mask else None
            try:
                out = self.layer(part, attention_mask=given, past_key_values=cache, use_cache=cache is not None)
            except REFUSALS as error:
                raise UserError(f"{self.place()}: fla's layer refuses this call: {_words(error)}") from error
            ys.append(out if isinstance(out, Tensor) else out[0])
        return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)

    @staticmethod
    def _library_mask(n_sequences: int, n_tokens: int, padding: Tensor | None, device: torch.device) -> Tensor:
        """1 at real tokens, over all tokens from the first on, as the library wants it."""
        if padding is None:
            return torch.ones(n_sequences, n_tokens, dtype=torch.int64, device=device)
        return (torch.arange(n_tokens, device=device) >= padding.unsqueeze(1)).long()

    def _require(self, x: Tensor, with_state: bool) -> None:
        place, facts = self.place(), self.facts
        if x.device.type not in self.traits.devices:
            raise UserError(
                f"{place}: needs a GPU, and its input is on {x.device.type}: fla's layers are kernels for CUDA; "
                "move model and input there (mixlab doctor lists the devices)"
            )
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if dtype == torch.float64:
            raise UserError(f"{place}: no kernel of fla computes in float64; use bfloat16 or float32")
        if facts.dtypes == "half" and dtype == torch.float32:
            raise UserError(
                f"{place}: its kernels take bfloat16 and float16 only; use bf16, by autocast or model.bfloat16()"
            )
        if torch.is_grad_enabled() and facts.gated_backward and getattr(self.config, "use_forget_gate", True):
            fault = gated_backward_fault(x.device, mended_by_tilelang=facts.gated_backward == "tilelang")
            if fault:
                raise UserError(f"{place}: training is refused here, its kernel would be wrong: {fault}")
        if with_state and facts.continues == "never":
            raise UserError(
                f"{place}: fla's layer keeps no state: it can't be continued, streamed or decoded with; "
                "call it on whole sequences, with neither state nor return_state"
            )
        if with_state and facts.inference_only == "eval" and self.training:
            raise UserError(f"{place}: fla's layer takes and gives a state in evaluation mode only; call .eval() first")
        if with_state and facts.inference_only == "no_grad" and (torch.is_grad_enabled() or self.training):
            raise UserError(
                f"{place}: fla's layer takes and gives a state in inference only; call .eval(), within torch.no_grad()"
            )

    def _padding(self, mask: Tensor | None, before: Tensor | None, seen: int, with_state: bool) -> Tensor | None:
        """Padded tokens at the left of each sequence (B,), None where nothing is or was padded there."""
        if mask is None or bool(mask.all()):
            return before
        place = self.place()
        if seen > 0:
            raise UserError(
                f"{place}: mask: padding behind a state isn't supported by fla's layers; pad the first call's left"
            )
        is_left = bool((mask[:, 1:] >= mask[:, :-1]).all())
        is_right = bool((mask[:, 1:] <= mask[:, :-1]).all())
        if is_right and not with_state:
            return before  # the layer is causal: nothing real comes after it
        if not is_left:
            raise UserError(
                f"{place}: mask: padding must be at the left of each sequence"
                + ("" if with_state else " or at the right of all")
                + "; fla's layers support no other"
            )
        if self.facts.mask == "none" or (self.facts.mask == "stateless" and with_state):
            when = " together with a state" if self.facts.mask == "stateless" else ""
            raise UserError(
                f"{place}: mask: fla's layer understands no left padding{when}; give sequences of one length"
            )
        if self.facts.inference_only == "eval" and self.training:
            raise UserError(
                f"{place}: mask: fla's layer takes left padding in evaluation mode only; call .eval() first"
            )
        if not bool(mask.any(dim=1).all()):
            raise UserError(f"{place}: mask: a sequence of padding only isn't supported by fla's layers; leave it out")
        return (~mask).sum(dim=1)


def layer_class(name: str) -> type[FlaLayer]:
    """The mixer class of ``fla:<layer>``.

    Raises:
        UserError: the library isn't installed, has no such layer, or the layer is no mixer on its own.
    """
    folder = package_folder()
    if folder is None:
        raise UserError(f"mixer {name!r}: needs the package flash-linear-attention, not installed here; {FLA_INSTALL}")
    known = sources(folder)
    short = name.removeprefix(PREFIX)
    if short in NOT_MIXERS and short in known:
        raise UserError(f"mixer {name!r}: no mixer on its own: {NOT_MIXERS[short]}")
    if short not in known:
        names = [PREFIX + other for other in known if other in FACTS]
        raise UserError(f"unknown mixer {name!r}{nearest(name, names)}; mixlab mixers --fla lists them")
    if short not in FACTS:
        raise UserError(
            f"mixer {name!r}: this flash-linear-attention is newer than what is known here; "
            f"install the supported one: {FLA_INSTALL}"
        )
    return _made(folder, short)


@functools.cache
def _made(folder: Path, short: str) -> type[FlaLayer]:
    """One class for each layer, made once."""
    source, facts = sources(folder)[short], FACTS[short]
    growth = "config" if facts.growth == "window_size" else facts.growth
    given = arguments(folder, source)
    members = {
        "__doc__": f"fla.layers.{source.class_name} as a mixer. {facts.note}".rstrip(),
        "__module__": __name__,
        "name": PREFIX + short,
        "Config": config_class(f"Fla{source.class_name}Config", given, set(facts.fixed), facts.defaults),
        "traits": Traits(state_growth=growth, devices=("cuda",), resumable=facts.continues != "never"),
        "facts": facts,
        "layer_source": source,
        "numbered": any(argument.name == "layer_idx" for argument in given),
    }
    return type(f"Fla{source.class_name}", (FlaLayer,), members)


def _words(error: BaseException) -> str:
    """``AssertionError: why``, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text}"
