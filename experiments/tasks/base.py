"""What a task is: batches that are a pure function of (config, seed, split, step), and how they are scored.

Tasks hold NumPy arrays only; the training loop turns them into tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from mixers.config import StrictModel

IGNORE = -100  # target of a position that is not scored
Split = Literal["train", "select", "report"]
EVAL_SPLITS: tuple[Split, ...] = ("select", "report")


class Batch(NamedTuple):
    """tokens (B,T) int64 in; targets (B,T) int64 to predict at the same positions, IGNORE where not scored."""

    tokens: np.ndarray
    targets: np.ndarray


class TaskConfig(StrictModel):
    """Base of task options; ``name`` picks the task."""

    name: str


class Scorer(ABC):
    """Accumulates per-position results of one evaluation."""

    @abstractmethod
    def update(self, batch: Batch, nll_nats: np.ndarray, correct: np.ndarray) -> None:
        """Take one batch: negative log-likelihood (B,T) in nats and whether the argmax was right (B,T) bool.

        Both are meaningful only where ``batch.targets != IGNORE``.
        """

    @abstractmethod
    def result(self) -> dict[str, float]:
        """Metrics by name, without the split: ``loss`` (mean nats), ``accuracy``, ..."""


class Task(ABC):
    """One task with its data."""

    vocab_size: int
    # Whether training batches can be laid out so that step i+1 continues the sequences of step i.
    can_stream: ClassVar[bool] = False
    # Metrics by which a higher value is better; all others are better when lower.
    higher_is_better: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def tokens_per_example(self) -> float:
        """Mean training tokens per example, to turn a token budget into steps."""

    @abstractmethod
    def train_batch(self, step: int, batch_size: int, order_seed: int, *, contiguous: bool = False) -> Batch:
        """Batch number ``step`` (from 0): a pure function of its arguments. ``contiguous``: row b of step i+1
        continues row b of step i."""

    @abstractmethod
    def eval_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """All samples of ``select`` or ``report``, in a fixed order, the last batch possibly smaller."""

    @abstractmethod
    def scorer(self, split: Split) -> Scorer:
        """A fresh scorer."""

    @abstractmethod
    def data_hash(self) -> str:
        """SHA-256 (16 hex digits) over the data of all splits."""
