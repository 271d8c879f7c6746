"""The contract that every sequence mixer keeps: state in, state out, nothing hidden.

Letters used everywhere: B batch, T tokens, D width, H heads, K key width, V value width, C chunk, N slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mixers.config import MixerConfig

Slot = Literal["token", "memory", "channel"]
SLOTS: tuple[Slot, ...] = ("token", "memory", "channel")

# A state is a pytree of tensors: a tensor, None, or a (named) tuple, list or dict of states.
State = Any


@dataclass(frozen=True)
class Traits:
    """What a mixer declares about itself. Tests measure every item; none is taken on trust.

    causal: output t depends on inputs up to t only.
    state_scope: ``sequence``, one state per sequence; ``shared``, the batch shares one; ``config``, an option decides.
    state_growth: of the state's bytes with the tokens seen: ``none`` (no state), ``constant``, ``linear``,
        ``window`` (grows up to a bound), ``config`` (an option decides).
    devices: where it runs.
    exact_chunking: False when outputs depend on an option like the chunk length by definition of the layer.
    resumable: False when the layer has a past but keeps no state of it: asking for one is an error.
    """

    causal: bool = True
    state_scope: Literal["sequence", "shared", "config"] = "sequence"
    state_growth: Literal["none", "constant", "linear", "window", "config"] = "constant"
    devices: tuple[str, ...] = ("cpu", "cuda")
    exact_chunking: bool = True
    resumable: bool = True


@dataclass(frozen=True)
class ParameterOptions:
    """How the optimiser must treat one parameter."""

    weight_decay: bool = True
    lr_scale: float = 1.0


class MixerOutput(NamedTuple):
    """y (B,T,D); the new state, or None unless ``return_state``; named scalars to log or to add to the loss.

    An aux entry whose name starts with ``loss/`` is added to the training loss; all others are only logged.
    """

    y: Tensor
    state: State
    aux: dict[str, Tensor]


class Mixer(nn.Module, ABC):
    """A layer (B,T,D) -> (B,T,D) that mixes tokens of a sequence.

    ``forward`` changes nothing in the module: ``y, s = m(x[:, :i])`` then ``m(x[:, i:], s)`` equals one call. The
    exception, in training, is what ``batch_statistics`` names.
    The mixer owns its initialisation; whoever builds a model around it never overrides it.
    """

    Config: ClassVar[type[MixerConfig]] = MixerConfig
    traits: ClassVar[Traits] = Traits()
    name: ClassVar[str] = ""  # set by @register
    family: ClassVar[str] = ""  # for listings: attention, linear attention, delta rule, memory, ...
    source: ClassVar[str] = ""  # the paper
    default_slot: ClassVar[Slot] = "token"
    # True when the layer normalises its own input: a block then feeds it the raw residual stream.
    normalises_input: ClassVar[bool] = False

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(
        self, x: Tensor, state: State = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        """Mix ``x`` (B,T,D), continuing from ``state`` (None: fresh). ``mask`` (B,T) bool: False marks padding."""

    @abstractmethod
    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """State before the first token. ``forward(x)`` equals ``forward(x, initial_state(...))``."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise every parameter and buffer, from torch's global generator only."""

    @abstractmethod
    def flops_per_token(self, context: int) -> float | None:
        """Forward FLOPs for one more token after ``context`` tokens (a multiply-add is 2), readable path.

        Counts matrix products as torch's flop counter does; element-wise work is left out. None: unknown, for a layer
        of another library's kernels.
        """

    def active_rows(self) -> dict[str, int]:
        """Trained parameters of which one token reads only some rows, as of a sparsely read table: name -> how many.

        A row is an entry of the first dimension, read when the token's output depends on it. The number is that of a
        token whose choices all differ; what isn't named is read whole.
        """
        return {}

    def active_params_per_token(self) -> int:
        """Trained parameters that the output of one token depends on: all, but for the rows it leaves unread."""
        rows = self.active_rows()
        return sum(
            parameter[0].numel() * rows[name] if name in rows else parameter.numel()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        )

    @property
    def impl(self) -> str:
        """The implementation that runs, after resolving ``auto``."""
        return "reference"

    @property
    def state_scope(self) -> str:
        """The resolved state scope of this instance: ``sequence`` or ``shared``."""
        assert self.traits.state_scope != "config", f"{type(self).__name__} must override state_scope"
        return self.traits.state_scope

    @property
    def state_growth(self) -> str:
        """The resolved growth of this instance's state: ``none``, ``constant``, ``linear`` or ``window``."""
        assert self.traits.state_growth != "config", f"{type(self).__name__} must override state_growth"
        return self.traits.state_growth

    @property
    def batch_statistics(self) -> tuple[str, ...]:
        """Names of the buffers that forward writes in training: running averages of a batch normalisation.

        The one declared exception to purity. In training, outputs of such a layer depend on all tokens of the call;
        it keeps the whole contract in evaluation.
        """
        return ()

    def full_state_bytes(self, state: State) -> int:
        """Bytes of a state of this mixer when whatever it leaves out because nothing changed it is counted too.

        What comparisons count, and what ``state_growth`` and the scope are measured in. A state that stores only what
        differs from the initial one overrides it: its memory is as large as it may become.
        """
        return state_bytes(state)

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """Optimiser options of own parameters by name; unnamed ones get the trainer's rules."""
        return {}


def map_state(fn: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply ``fn`` to every tensor of a state, keeping its structure."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return fn(state)
    if isinstance(state, dict):
        return {key: map_state(fn, item) for key, item in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(map_state(fn, item) for item in state))
    if isinstance(state, (tuple, list)):
        return type(state)(map_state(fn, item) for item in state)
    raise TypeError(f"a state holds tensors, None, tuples, lists and dicts only, not {type(state).__name__}")


def state_tensors(state: State) -> list[Tensor]:
    """All tensors of a state, in a fixed order."""
    found: list[Tensor] = []
    map_state(lambda tensor: found.append(tensor) or tensor, state)
    return found


def state_bytes(state: State) -> int:
    """Bytes of all tensors of a state: elements times element size, expanded views counted in full."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(state))


def detach_state(state: State) -> State:
    """The same values without their gradient history."""
    return map_state(Tensor.detach, state)
