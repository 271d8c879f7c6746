"""The one backbone that all mixers share: a pre-norm residual decoder with three slots per block."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.config import ExperimentConfig, ModelConfig, StateConfig
from experiments.errors import UserError
from experiments.pattern import MixerSpec, Pattern, parse_pattern
from mixers import registry
from mixers.base import Mixer, MixerConfig, Slot, State
from mixers.norms import RMSNorm
from mixers.short_conv import ShortConv


class BackboneOutput(NamedTuple):
    """hidden (B,T,D), final-normed: give it to :meth:`Backbone.logits`; the state or None; aux scalars by name."""

    hidden: Tensor
    state: State
    aux: dict[str, Tensor]


class BackboneState(NamedTuple):
    """blocks: one dict per layer, sub-layer name to its state; position: tokens seen, () int64."""

    blocks: tuple[dict[str, State], ...]
    position: Tensor


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) * W2 x), no biases. Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)
        nn.init.normal_(self.gate_up.weight, std=d_model**-0.5)
        nn.init.normal_(self.down.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def flops_per_token(self) -> float:
        return 2 * (self.gate_up.weight.numel() + self.down.weight.numel())


class Block(nn.Module):
    """Sub-layers in the order memory, short convolution, token, channel; each x <- x + f(norm(x)).

    A mixer that normalises its own input is given x itself.
    """

    def __init__(self, config: ModelConfig, mixers: dict[Slot, Mixer]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleDict()
        self.norms = nn.ModuleDict()
        if "memory" in mixers:
            self._add("memory", mixers["memory"], config)
        if config.short_conv:
            self._add("conv", ShortConv(config.d_model, config.short_conv, activation=False), config)
        if "token" in mixers:
            self._add("token", mixers["token"], config)
        if "channel" in mixers:
            self._add("channel", mixers["channel"], config)
        elif config.mlp == "swiglu":
            self._add("mlp", SwiGLU(config.d_model, mlp_width(config)), config)

    def _add(self, name: str, module: nn.Module, config: ModelConfig) -> None:
        self.sublayers[name] = module
        if not (isinstance(module, Mixer) and module.normalises_input):
            self.norms[name] = RMSNorm(config.d_model, eps=config.norm_eps)

    def forward(
        self, x: Tensor, state: dict[str, State] | None, return_state: bool, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, State], dict[str, Tensor]]:
        new_state: dict[str, State] = {}
        aux: dict[str, Tensor] = {}
        for name, module in self.sublayers.items():
            inner = self.norms[name](x) if name in self.norms else x
            before = None if state is None else state.get(name)
            if isinstance(module, Mixer):
                out = module(inner, before, return_state=return_state, mask=mask)
                x = x + out.y
                new_state[name] = out.state
                aux.update({f"{name}/{key}": value for key, value in out.aux.items()})
            elif isinstance(module, ShortConv):
                y, new_state[name] = module(inner, before, mask=mask)
                x = x + y
            else:
                x = x + module(inner)
        return x, new_state, aux


class Backbone(nn.Module):
    """Token embedding, blocks, final norm, output projection. Never touches a mixer's initialisation."""

    def __init__(self, config: ModelConfig, vocab_size: int, state: StateConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.pattern = parse_pattern(config.pattern)
        plan = layer_plan(self.pattern, config)
        # Built and drawn first, so that all arms of a seed start from the same embedding.
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_positions, config.d_model)
            nn.init.normal_(self.positions.weight, std=1.0)
        self.head = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, vocab_size, bias=False)
            nn.init.normal_(self.head.weight, std=config.d_model**-0.5)
        scope = None if state is None else state.scope
        self.blocks = nn.ModuleList(
            Block(config, {slot: build_mixer(spec, config.d_model, scope) for slot, spec in layer.items()})
            for layer in plan
        )
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)

    def forward(
        self,
        tokens: Tensor,
        state: BackboneState | None = None,
        *,
        return_state: bool = False,
        mask: Tensor | None = None,
    ) -> BackboneOutput:
        """tokens (B,T) int64, continuing from ``state``; mask (B,T) bool, False at padding."""
        n_tokens = tokens.shape[1]
        # The stream starts with entries of unit size, as sub-layers' outputs have: a smaller embedding would be drowned
        # by the first of them. The tied output projection keeps the small weights (Vaswani et al. 2017, section 3.4).
        x = self.embedding(tokens) * self.config.d_model**0.5
        position = x.new_zeros((), dtype=torch.int64) if state is None else state.position
        if self.config.positions == "learned":
            indices = position + torch.arange(n_tokens, device=tokens.device)
            if n_tokens and int(indices[-1]) >= self.config.max_positions:
                raise UserError(
                    f"model.max_positions={self.config.max_positions}: the input reaches position {int(indices[-1])};"
                    " raise it, or use positions='none'"
                )
            x = x + self.positions(indices)
        states, aux = [], {}
        for layer, block in enumerate(self.blocks):
            before = None if state is None else state.blocks[layer]
            x, after, block_aux = block(x, before, return_state, mask)
            states.append(after)
            aux.update({f"{layer}/{key}": value for key, value in block_aux.items()})
        new_state = BackboneState(tuple(states), position + n_tokens) if return_state else None
        return BackboneOutput(self.norm(x), new_state, aux)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., vocabulary)."""
        return self.head(hidden) if self.head is not None else F.linear(hidden, self.embedding.weight)

    def named_mixers(self) -> dict[str, Mixer]:
        """Mixers by ``layer.slot``."""
        return {
            f"{layer}.{name}": module
            for layer, block in enumerate(self.blocks)
            for name, module in block.sublayers.items()
            if isinstance(module, Mixer)
        }

    @property
    def resumable(self) -> bool:
        """Whether every mixer can give a state to continue from."""
        return all(mixer.traits.resumable for mixer in self.named_mixers().values())

    def flops_per_token(self, context: int) -> float | None:
        """Forward FLOPs for one more token after ``context`` tokens: matrix products and short convolutions.

        None where a mixer's are unknown.
        """
        total = 2.0 * self.embedding.weight.numel()
        for block in self.blocks:
            for module in block.sublayers.values():
                if isinstance(module, Mixer):
                    of_mixer = module.flops_per_token(context)
                    if of_mixer is None:
                        return None
                    total += of_mixer
                elif isinstance(module, SwiGLU):
                    total += module.flops_per_token()
                else:
                    total += 2 * self.config.short_conv * self.config.d_model
        return total


def mlp_width(config: ModelConfig) -> int:
    """The given width, or 8/3 D rounded up to a multiple of 8."""
    return config.mlp_width or -(-8 * config.d_model // 24) * 8


def layer_plan(pattern: Pattern, config: ModelConfig) -> list[dict[Slot, MixerSpec]]:
    """Slot to mixer for every layer; a placement that doesn't fit is a :class:`UserError`."""
    place = f"pattern {str(pattern)!r}"
    plan: list[dict[Slot, MixerSpec]] = []
    for layer in range(config.n_layers):
        spec = pattern.token[layer % len(pattern.token)]
        plan.append({} if spec is None else {"token": spec})
    if len(pattern.token) > config.n_layers:
        raise UserError(
            f"{place}: names {len(pattern.token)} token mixers for n_layers={config.n_layers}; "
            "the last would never be used"
        )
    for placed in pattern.placements:
        slot = placed.slot or registry.get(placed.mixer.name).default_slot
        for layer in placed.layers:
            if layer >= config.n_layers:
                raise UserError(
                    f"{place}: {placed.mixer.name}@{layer}: there is no layer {layer}; "
                    f"n_layers={config.n_layers}, counted from 0"
                )
            if slot in plan[layer]:
                raise UserError(
                    f"{place}: {placed.mixer.name}@{layer}: the {slot} slot of layer {layer} already holds "
                    f"{plan[layer][slot].name}"
                )
            plan[layer][slot] = placed.mixer
    return plan


def mixer_config(spec: MixerSpec, d_model: int, scope: str | None) -> MixerConfig:
    """The mixer's validated options, width and state scope filled in."""
    cls = registry.get(spec.name)
    options: dict[str, Any] = dict(spec.options)
    place = f"pattern: {spec.name}"
    if options.get("d_model", d_model) != d_model:
        raise UserError(f"{place}: d_model={options['d_model']} differs from model.d_model={d_model}; leave it out")
    options["d_model"] = d_model
    if scope is not None and "scope" in cls.Config.model_fields:
        if options.get("scope", scope) != scope:
            raise UserError(f"{place}: scope={options['scope']} contradicts state.scope={scope}; give one of them")
        options["scope"] = scope
    return cls.Config.parse(options, place)


def build_mixer(spec: MixerSpec, d_model: int, scope: str | None) -> Mixer:
    return registry.get(spec.name)(mixer_config(spec, d_model, scope))


def validate_model(config: ExperimentConfig) -> None:
    """Check pattern, placements and every mixer's options without building the model."""
    pattern = parse_pattern(config.model.pattern)
    for layer in layer_plan(pattern, config.model):
        for spec in layer.values():
            mixer_config(spec, config.model.d_model, config.state.scope)


def build_model(config: ExperimentConfig, vocab_size: int) -> Backbone:
    """The model, drawn from the experiment's weights seed; the caller's random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed_for("weights"))
        return Backbone(config.model, vocab_size, config.state)
