"""The healthy mixer with one planted fault each, and the check that is there to find it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
from pydantic import ConfigDict
from torch import nn
from torch.nn import functional

from mixers.base import Mixer, MixerOutput, Traits, map_state
from mixers.config import MixerConfig
from mixers.masking import zero_padding
from tests.mixers.contract.healthy import DecayedSum, DecayedSumConfig

FAULTS: dict[str, tuple[type[Mixer], str]] = {}


def caught_by(check: str) -> Callable[[type[Mixer]], type[Mixer]]:
    """The check that must fail for this mixer."""

    def add(cls: type[Mixer]) -> type[Mixer]:
        FAULTS[cls.__name__] = (cls, check)
        return cls

    return add


def replace_y(out: MixerOutput, y: torch.Tensor) -> MixerOutput:
    return out._replace(y=y)


@caught_by("shapes")
class NoTokensCrash(DecayedSum):
    def forward(self, x, state=None, *, return_state=False, mask=None):
        assert x.shape[1] > 0
        return super().forward(x, state, return_state=return_state, mask=mask)


@caught_by("shapes")
class OutputAlwaysFloat32(DecayedSum):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        return replace_y(out, out.y.float())


@caught_by("shapes")
class StateUnasked(DecayedSum):
    def forward(self, x, state=None, *, return_state=False, mask=None):
        return super().forward(x, state, return_state=True, mask=mask)


@caught_by("shapes")
class AuxPerToken(DecayedSum):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        return out._replace(aux={"norm": out.y.norm(dim=-1)})


@caught_by("causality")
class SeesOneTokenAhead(DecayedSum):
    def forward(self, x, state=None, **options):
        ahead = functional.pad(x[:, 1:], (0, 0, 0, 1 if x.shape[1] else 0))
        return super().forward(x + 0.1 * ahead, state, **options)


@caught_by("causality")
class TopKOverTime(DecayedSum):
    """Keeps the better half of the tokens: a choice that depends on the future, and has no gradient."""

    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        norms = x.detach().norm(dim=-1)
        best = torch.zeros_like(norms).scatter(1, norms.topk(-(-x.shape[1] // 2), dim=1).indices, 1.0)
        return replace_y(out, out.y * (1 + best[..., None]))


@caught_by("causality")
class ConvolutionPaddedRight(DecayedSum):
    def convolve(self, x, past, mask):
        y, new_past = super().convolve(x, past, mask)
        n_late = self.conv.kernel - 1
        return functional.pad(y, (0, 0, 0, n_late))[:, n_late:], new_past


@caught_by("nan_in_future")
class ZeroTimesFuture(DecayedSum):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        return replace_y(out, out.y + 0.0 * x.sum(1, keepdim=True))


@caught_by("batch")
class StateOfTheFirstSequence(DecayedSum):
    def scan(self, inputs, total):
        return super().scan(inputs, total[:1].expand_as(total))


@caught_by("batch")
class BatchMean(DecayedSum):
    def forward(self, x, state=None, **options):
        return super().forward(x - 0.1 * x.mean(0, keepdim=True), state, **options)


@caught_by("batch")
class DeclaredShared(DecayedSum):
    traits = Traits(state_scope="shared")


@caught_by("state_scope")
class SharedWithStatePerSequence(BatchMean):
    traits = Traits(state_scope="shared")


@caught_by("purity")
class WritesParameter(DecayedSum):
    def forward(self, x, state=None, **options):
        with torch.no_grad():
            self.decay.mul_(0.999)
        return super().forward(x, state, **options)


@caught_by("purity")
class WritesBuffer(DecayedSum):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        if self.training and x.numel():
            self.scale.lerp_(x.detach().to(self.scale.dtype).abs().mean((0, 1)), 0.01)
        return out


@caught_by("purity")
class WritesMoreThanDeclared(WritesBuffer):
    """A second running average beside the declared one."""

    batch_statistics = ("running_mean",)

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("running_mean", torch.zeros(config.d_model))

    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        if self.training and x.numel():
            self.running_mean.lerp_(x.detach().to(self.running_mean.dtype).mean((0, 1)), 0.1)
        return out


@caught_by("purity")
class WritesStatisticsInEvaluation(DecayedSum):
    batch_statistics = ("scale",)

    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        if x.numel():
            self.scale.lerp_(x.detach().to(self.scale.dtype).abs().mean((0, 1)), 0.01)
        return out


@caught_by("purity")
class DeclaresStatisticsButWritesNone(DecayedSum):
    batch_statistics = ("scale",)


@caught_by("purity")
class DeclaresAParameterAsStatistics(WritesParameter):
    batch_statistics = ("decay",)


@caught_by("train_eval")
class DeclaresStatisticsButUsesNone(WritesBuffer):
    """Collects averages that change no output."""

    batch_statistics = ("scale",)

    def forward(self, x, state=None, **options):
        scale = self.scale.clone()
        out = super().forward(x, state, **options)
        if self.training:
            self.scale.copy_(scale)
        return out


@caught_by("purity")
class RemembersInAttribute(DecayedSum):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        self.last_output = out.y.detach()
        return out


@caught_by("purity")
class DrawsRandomNumbers(DecayedSum):
    def forward(self, x, state=None, **options):
        torch.rand(1)
        return super().forward(x, state, **options)


@caught_by("purity")
class WritesInput(DecayedSum):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        x.detach().mul_(0.5)
        return out


@caught_by("purity")
class WritesGivenState(DecayedSum):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        if state is not None:
            state.queue.detach().mul_(0.5)
        return out


@caught_by("purity")
class TurnsTrainingOff(DecayedSum):
    def forward(self, x, state=None, **options):
        self.conv.training = False
        return super().forward(x, state, **options)


@caught_by("cuts")
class DropsOddTail(DecayedSum):
    """The last token of an odd call isn't written to the state."""

    def scan(self, inputs, total):
        sums, last = super().scan(inputs, total)
        n_tokens = inputs.shape[1]
        return sums, last if n_tokens % 2 == 0 else (sums[:, -2] if n_tokens > 1 else total)


@caught_by("cuts")
class DecodingScaledByLength(DecayedSum):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        return replace_y(out, out.y * (1 + 1e-3 * x.shape[1]))


@caught_by("cuts")
class HalfPrecisionState(DecayedSum):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        return out._replace(state=map_state(lambda part: part.half().to(part.dtype), out.state))


@caught_by("cuts")
class StateWithoutGradient(DecayedSum):
    def scan(self, inputs, total):
        return super().scan(inputs, total.detach())


@caught_by("cuts")
class EmptyCallForgets(DecayedSum):
    def forward(self, x, state=None, **options):
        return super().forward(x, state if x.shape[1] else None, **options)


@caught_by("initial_state")
class OtherInitialState(DecayedSum):
    def forward(self, x, state=None, **options):
        fresh = super().initial_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        return super().forward(x, fresh, **options)

    def initial_state(self, batch_size, *, device, dtype):
        state = super().initial_state(batch_size, device=device, dtype=dtype)
        return state._replace(total=state.total + 0.1)


@caught_by("padding")
class IgnoresMask(DecayedSum):
    def forward(self, x, state=None, *, return_state=False, mask=None):
        return super().forward(x, state, return_state=return_state)


@caught_by("padding")
class AllPaddingIsNaN(DecayedSum):
    def forward(self, x, state=None, *, return_state=False, mask=None):
        out = super().forward(x, state, return_state=return_state, mask=mask)
        if mask is None or not x.shape[1]:
            return out
        n_real = mask.sum(1).to(x.dtype)[:, None, None]
        return replace_y(out, out.y * (n_real / n_real))


@caught_by("padding")
class LeftPaddingCounts(DecayedSum):
    """A padded token adds a constant to the sum."""

    def forward(self, x, state=None, *, return_state=False, mask=None):
        x = zero_padding(x, mask) + (0 if mask is None else 0.1 * (~mask)[..., None])
        return super().forward(x, state, return_state=return_state)


@caught_by("full_mask")
class AnyMaskScales(DecayedSum):
    def forward(self, x, state=None, *, return_state=False, mask=None):
        out = super().forward(x, state, return_state=return_state, mask=mask)
        return out if mask is None else replace_y(out, out.y * 1.01)


@caught_by("parameter_gradients")
class UnusedParameter(DecayedSum):
    def __init__(self, config):
        super().__init__(config)
        self.spare = nn.Linear(config.d_model, config.d_model)


@caught_by("parameter_gradients")
class FrozenParameter(DecayedSum):
    def __init__(self, config):
        super().__init__(config)
        self.decay.requires_grad_(False)


@caught_by("parameter_gradients")
class InfiniteGradient(DecayedSum):
    """sqrt has an infinite slope at zero, and zero times infinity is NaN."""

    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        return replace_y(out, out.y + torch.sqrt((self.delayed - self.delayed).square()))


@caught_by("finite_differences")
class DetachedGate(DecayedSum):
    def __init__(self, config):
        super().__init__(config)
        self.gate.register_forward_hook(lambda module, args, y: 0.5 * y + 0.5 * y.detach())


@caught_by("state_growth")
class GrowsButDeclaredConstant(DecayedSum):
    def forward(self, x, state=None, *, return_state=False, mask=None):
        inner, seen = state or self.initial_state(x.shape[0], device=x.device, dtype=x.dtype)
        out = super().forward(x, inner, return_state=return_state, mask=mask)
        return out._replace(state=(out.state, torch.cat([seen, x], 1)) if return_state else None)

    def initial_state(self, batch_size, *, device, dtype):
        inner = super().initial_state(batch_size, device=device, dtype=dtype)
        return inner, inner.conv.new_zeros(batch_size, 0, self.config.d_model)


@caught_by("state_growth")
class ConstantButDeclaredLinear(DecayedSum):
    traits = Traits(state_growth="linear")


@caught_by("state_growth")
class ConstantButDeclaredNone(DecayedSum):
    traits = Traits(state_growth="none")


@caught_by("state_growth")
class GrowsButDeclaredWindow(GrowsButDeclaredConstant):
    traits = Traits(state_growth="window")


@caught_by("state_storage")
class ViewsOfALargeBuffer(DecayedSum):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        return out._replace(
            state=map_state(lambda part: part.repeat(1, 9, *[1] * (part.ndim - 2))[:, : part.shape[1]], out.state)
        )


@caught_by("flops")
class FlopsTwice(DecayedSum):
    def flops_per_token(self, context):
        return 2 * super().flops_per_token(context)


@caught_by("flops")
class FlopsGrowWithContext(DecayedSum):
    def flops_per_token(self, context):
        return super().flops_per_token(context) + context


class ReadsATable(DecayedSum):
    """Healthy: adds one of 64 trained rows, chosen by the largest channel's index and sign."""

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Parameter(torch.randn(64, config.d_model))

    def active_rows(self):
        return {"table": 1}

    def forward(self, x, state=None, *, return_state=False, mask=None):
        out = super().forward(x, state, return_state=return_state, mask=mask)
        rows = torch.cat([x, -x], dim=-1).argmax(-1)
        return replace_y(out, zero_padding(out.y + self.table[rows], mask))


@caught_by("active_parameters")
class TableNotNamed(ReadsATable):
    def active_rows(self):
        return {}


@caught_by("active_parameters")
class ReadsMoreThanItSays(ReadsATable):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        return replace_y(out, out.y + self.table[-1])


@caught_by("active_parameters")
class SaysMoreThanItReads(ReadsATable):
    def active_rows(self):
        return {"table": 2}


@caught_by("active_parameters")
class NamesNoParameter(ReadsATable):
    def active_rows(self):
        return super().active_rows() | {"tables": 1}


@caught_by("reset")
class BufferSurvivesReset(DecayedSum):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("offset", torch.zeros(config.d_model), persistent=False)


@caught_by("reset")
class ParameterSurvivesReset(DecayedSum):
    def reset_parameters(self):
        kept = self.decay.detach().clone()
        super().reset_parameters()
        if torch.isfinite(kept).all():
            with torch.no_grad():
                self.decay.copy_(kept)


@caught_by("reset")
class ResetUsesOtherGenerator(DecayedSum):
    def reset_parameters(self):
        super().reset_parameters()
        with torch.no_grad():
            self.decay.add_(random.random())


@caught_by("state_dict")
class DrawnBufferNotSaved(DecayedSum):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", self.scale, persistent=False)


@caught_by("determinism")
class DropoutInEvaluation(DecayedSum):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        return replace_y(out, functional.dropout(out.y, 0.1, training=True))


@caught_by("determinism")
class OrderChanges(DecayedSum):
    """Sums in another order at every second call: equal to rounding, not to the bit."""

    calls = itertools.count()

    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        parts = [0.1, 0.2, 0.3] if next(self.calls) % 2 else [0.3, 0.2, 0.1]
        return replace_y(out, out.y * (parts[0] + parts[1] + parts[2]))


@caught_by("train_eval")
class OtherInTraining(DecayedSum):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        return replace_y(out, out.y * 1.01) if self.training else out


@caught_by("bf16")
class CoarseUnderAutocast(DecayedSum):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        return replace_y(out, out.y * 1.1) if torch.is_autocast_enabled("cpu") else out


@caught_by("compile")
class OtherWhenCompiled(DecayedSum):
    def forward(self, x, state=None, **options):
        out = super().forward(x, state, **options)
        return replace_y(out, out.y * 1.01) if torch.compiler.is_compiling() else out


class LooseConfig(DecayedSumConfig):
    model_config = ConfigDict(extra="ignore")


class ThawedConfig(DecayedSumConfig):
    model_config = ConfigDict(frozen=False)


class ForgetfulConfig(DecayedSumConfig):
    @classmethod
    def parse(cls, values, place):
        return super().parse({**values, "conv_kernel": 5}, place)


@caught_by("config")
class AcceptsUnknownOptions(DecayedSum):
    Config = LooseConfig


@caught_by("config")
class OptionsCanChange(DecayedSum):
    Config = ThawedConfig


@caught_by("config")
class OptionsLostInJson(DecayedSum):
    Config = ForgetfulConfig


@caught_by("config")
class ConfigOfAnotherClass(DecayedSum):
    def __init__(self, config):
        super().__init__(config)
        self.config = MixerConfig(d_model=config.d_model)
