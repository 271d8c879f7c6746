"""One experiment: model, task, training, state protocol, seed. Strict everywhere; hashed to the run's key."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from experiments.errors import UserError
from experiments.tasks.mqar import MQARConfig
from experiments.tasks.text import TextConfig
from mixers.config import StrictModel

# Raised when a change of code makes results of the same config incomparable: it enters every run's key.
RESULTS_VERSION = 1


class ModelConfig(StrictModel):
    """A pre-norm residual decoder. ``pattern`` names what stands in its slots, see docs/patterns.md."""

    pattern: str
    d_model: int = Field(64, gt=0, description="width D of the residual stream")
    n_layers: int = Field(2, gt=0)
    mlp: Literal["none", "swiglu"] = "none"
    mlp_width: int | None = Field(None, gt=0, description="hidden width; None: 8/3 D rounded up to a multiple of 8")
    short_conv: int = Field(
        0, ge=0, description="kernel of a causal depthwise convolution before the token mixer; 0: none"
    )
    positions: Literal["none", "learned"] = "none"
    max_positions: int = Field(2048, gt=0, description="length of the learned position table")
    tie_embeddings: bool = True
    norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mlp == "none" and self.mlp_width is not None:
            raise ValueError(f"mlp_width={self.mlp_width} needs mlp='swiglu'")
        return self


class StopConfig(StrictModel):
    """Early stop. Only a ``select/`` metric may end a training: ``report`` is read once, for the table."""

    metric: str
    threshold: float | None = Field(None, description="stop when the metric is at least as good as this")
    patience: int | None = Field(None, gt=0, description="stop after so many evaluations without a new best")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.metric.startswith("select/"):
            raise ValueError(
                f"early stop reads the select split only: metric must start with 'select/', got {self.metric!r}"
            )
        if self.threshold is None and self.patience is None:
            raise ValueError("give threshold or patience, or leave train.stop out")
        return self


class TrainConfig(StrictModel):
    """AdamW with warm-up and a schedule, bounded by tokens or by steps."""

    batch_size: int = Field(64, gt=0, description="sequences per step")
    max_tokens: int | None = Field(None, gt=0)
    max_steps: int | None = Field(None, gt=0)
    lr: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="the cosine ends at lr times this")
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip_norm: float | None = Field(1.0, gt=0)
    precision: Literal["auto", "float32", "bf16"] = "auto"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    compile: bool = False
    log_every: int = Field(10, gt=0, description="steps between training metrics")
    eval_every: int = Field(0, ge=0, description="steps between evaluations on select; 0: only at the end")
    eval_batch_size: int = Field(64, gt=0)
    stop: StopConfig | None = None
    checkpoint_every_s: float = Field(60.0, ge=0, description="seconds between checkpoints; 0: after every step")
    keep_checkpoint: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.max_tokens is None) == (self.max_steps is None):
            raise ValueError("give exactly one of max_tokens and max_steps")
        if self.stop is not None and self.eval_every == 0:
            raise ValueError("train.stop needs eval_every > 0: nothing would be evaluated before the end")
        return self


class StateConfig(StrictModel):
    """The state protocol: logged with every run, never implicit."""

    scope: Literal["sequence", "shared"] | None = Field(
        None, description="sets the option `scope` of every mixer that has one; None: what the pattern says"
    )
    carry: Literal["none", "stream"] = Field(
        "none", description="whether a training step continues the last one's state"
    )
    reset_between_samples: bool = Field(True, description="whether every evaluation batch starts from a fresh state")
    reads: int = Field(1, gt=0, description="times an evaluation sample is read, the state carried; the last is scored")


class SeedConfig(StrictModel):
    """Three independent seeds; None: derived from ``ExperimentConfig.seed``."""

    weights: int | None = Field(None, ge=0)
    data: int | None = Field(None, ge=0)
    order: int | None = Field(None, ge=0)


class ExperimentConfig(StrictModel):
    """Everything that decides a run's result."""

    model: ModelConfig
    task: Annotated[MQARConfig | TextConfig, Field(discriminator="name")]
    train: TrainConfig
    state: StateConfig = StateConfig()
    seed: int = Field(0, ge=0)
    seeds: SeedConfig = SeedConfig()

    def seed_for(self, what: Literal["weights", "data", "order"]) -> int:
        """The seed of one of the three random streams; different streams never share one."""
        given = getattr(self.seeds, what)
        if given is not None:
            return given
        digest = hashlib.sha256(f"{what}:{self.seed}".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    def resolved(self) -> dict[str, Any]:
        """All fields, defaults written out, as JSON values."""
        return self.model_dump(mode="json")

    def code(self) -> dict[str, str]:
        """The code that decides this run's result, beyond what the release stands for: file or mixer -> hash."""
        from experiments.source import run_code

        return run_code(self.model.pattern, type(self.task).__module__)

    def key(self, code: dict[str, str] | None = None) -> str:
        """The run's key: a hash of the full resolved config, of the results version, which stands for the code of a
        release, and of the code that is not as released. To read that takes torch; ``code`` is what it would say."""
        identity = {"results_version": RESULTS_VERSION, "config": self.resolved()}
        if code := self.code() if code is None else code:
            identity["code"] = code
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` to ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """``base`` with nested or dotted ``overrides`` laid over it; neither is changed."""
    result = {key: merged(value, {}) if isinstance(value, dict) else value for key, value in base.items()}
    for dotted, value in overrides.items():
        head, _, rest = dotted.partition(".")
        below = {rest: value} if rest else value
        if isinstance(below, dict):
            inner = result.get(head)
            result[head] = merged(inner if isinstance(inner, dict) else {}, below)
        else:
            result[head] = value
    return result


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file; a missing or malformed one is a :class:`UserError`."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
