"""Multi-query associative recall (MQAR): pairs first, then the keys again, each asking for its value.

Source: Arora et al. 2023, arXiv:2312.04927; mixtures of lengths as in Arora et al. 2024, arXiv:2402.18668.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from experiments.errors import UserError
from experiments.tasks.base import IGNORE, Batch, Scorer, Split, Task, TaskConfig
from experiments.tasks.streams import EpochOrder, Stream
from mixers.config import StrictModel

# Examples made at a time. It is part of what the data is, as every block has a random stream of its own.
BLOCK_EXAMPLES = 256
SPLIT_NUMBER: dict[Split, int] = {"train": 0, "select": 1, "report": 2}


class Segment(StrictModel):
    """``n_examples`` examples of one length and number of pairs."""

    seq_len: int = Field(gt=0, description="tokens T of an example")
    n_pairs: int = Field(gt=0, description="key-value pairs P, each asked for once")
    n_examples: int = Field(gt=0)

    @property
    def label(self) -> str:
        return f"T{self.seq_len}_P{self.n_pairs}"

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_layout(self.seq_len, self.n_pairs)
        return self


class MQARConfig(TaskConfig):
    """Options of MQAR. A mixture replaces the scalar lengths and counts of its splits."""

    name: Literal["mqar"] = "mqar"
    vocab_size: int = Field(8192, ge=4, description="keys come from 1..V/2-1, values from V/2..V-1")
    seq_len: int = Field(64, gt=0, description="tokens T of an example")
    n_pairs: int = Field(4, gt=0, description="key-value pairs P, each asked for once")
    power_a: float = Field(0.01, gt=0, description="a gap of g slots before a query has density a * g**(a-1)")
    filler: Literal["zeros", "random"] = Field("random", description="tokens between the queries")
    n_train: int = Field(100_000, gt=0, description="training examples")
    n_select: int = Field(1_000, gt=0, description="examples of the select split")
    n_report: int = Field(3_000, gt=0, description="examples of the report split")
    train_mixture: tuple[Segment, ...] | None = Field(None, min_length=1, description="segments to train on")
    eval_mixture: tuple[Segment, ...] | None = Field(None, min_length=1, description="segments of select and of report")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._refuse_replaced()
        if self.train_mixture is None or self.eval_mixture is None:
            _check_layout(self.seq_len, self.n_pairs)
        for segment in {*self.segments("train"), *self.segments("select")}:
            n_keys = self.vocab_size // 2 - 1
            if segment.n_pairs > n_keys:
                raise ValueError(
                    f"distinct keys need n_pairs <= vocab_size / 2 - 1; got n_pairs={segment.n_pairs}, vocab_size="
                    f"{self.vocab_size}: raise vocab_size to {2 * segment.n_pairs + 2} or lower n_pairs to {n_keys}"
                )
        labels = [segment.label for segment in self.segments("report")]
        if len(set(labels)) < len(labels):
            raise ValueError(
                f"eval_mixture: results are told apart by seq_len and n_pairs, but one stands twice: {labels}"
            )
        return self

    def _refuse_replaced(self) -> None:
        """A scalar that a mixture replaces would be ignored without a word."""
        replaced = {"n_train": self.train_mixture, "n_select": self.eval_mixture, "n_report": self.eval_mixture}
        replaced |= dict.fromkeys(("seq_len", "n_pairs"), self.train_mixture and self.eval_mixture)
        for name, mixture in replaced.items():
            if mixture and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)} has no effect: a mixture replaces it; leave it out")

    def segments(self, split: Split) -> tuple[Segment, ...]:
        """What a split is made of."""
        mixture = self.train_mixture if split == "train" else self.eval_mixture
        if mixture is not None:
            return mixture
        n_examples = {"train": self.n_train, "select": self.n_select, "report": self.n_report}[split]
        return (Segment(seq_len=self.seq_len, n_pairs=self.n_pairs, n_examples=n_examples),)


class Examples(NamedTuple):
    """Compact form of n examples: tokens (n,T) and, pair by pair, where its query sits (n,P)."""

    tokens: np.ndarray
    query_positions: np.ndarray


class MQARTask(Task):
    """Layout of an example, for P pairs in T tokens:

        k_1 v_1 k_2 v_2 ... k_P v_P | slots 0 .. S-1 of two tokens each, S = (T - 2P) / 2

    Keys are drawn without replacement from the lower half of the vocabulary (0 excepted), values likewise from
    the upper half. Pair by pair a slot is drawn without replacement, slot g-1 with weight a * g^(a-1); its first
    token repeats the key, and the target there is the key's value. All other targets are IGNORE. Filler tokens
    are 0, or uniform over the whole vocabulary.

    Ours differs from the published generator in its random streams only: examples are made block by block, so
    that the first n examples do not depend on how many are asked for.
    """

    can_stream: ClassVar[bool] = False
    higher_is_better: ClassVar[frozenset[str]] = frozenset({"accuracy"})

    def __init__(self, config: MQARConfig, data_seed: int) -> None:
        self.config = config
        self.data_seed = data_seed
        self.vocab_size = config.vocab_size
        self._order = EpochOrder(tuple(segment.n_examples for segment in config.segments("train")))
        self._splits: dict[Split, list[Examples]] = {}

    @property
    def tokens_per_example(self) -> float:
        segments = self.config.segments("train")
        return sum(s.n_examples * s.seq_len for s in segments) / sum(s.n_examples for s in segments)

    def train_batch(self, step: int, batch_size: int, order_seed: int, *, contiguous: bool = False) -> Batch:
        """Batch ``step``, from one segment, tokens and targets (batch_size,T).

        Raises UserError where a segment has fewer examples than a batch, and for ``contiguous``.
        """
        if contiguous:
            raise UserError(
                "state.carry='stream': the examples of task 'mqar' are independent and have no stream order; "
                "use task.name='text' or state.carry='none'"
            )
        for segment in self.config.segments("train"):
            if segment.n_examples < batch_size:
                raise UserError(
                    f"task mqar: {segment.n_examples} training examples of {segment.label} don't fill "
                    f"train.batch_size={batch_size}; lower it or raise the number of examples"
                )
        number, rows = self._order.batch(step, batch_size, order_seed)
        return _batch(self._examples("train")[number], rows)

    def eval_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        for examples in self._examples(split):
            n = len(examples.tokens)
            for start in range(0, n, batch_size):
                yield _batch(examples, np.arange(start, min(start + batch_size, n)))

    def scorer(self, split: Split) -> Scorer:
        return MQARScorer(n_segments=len(self.config.segments(split)))

    def data_hash(self) -> str:
        digest = hashlib.sha256()
        for split in SPLIT_NUMBER:
            for segment, examples in zip(self.config.segments(split), self._examples(split), strict=True):
                digest.update(f"{split} {segment.label} {segment.n_examples} {self.vocab_size}\n".encode())
                digest.update(examples.tokens.astype("<u4").data)
                digest.update(examples.query_positions.astype("<u4").data)
        return digest.hexdigest()[:16]

    def _examples(self, split: Split) -> list[Examples]:
        if split not in self._splits:
            self._splits[split] = [
                _generate(self.config, segment, self.data_seed, SPLIT_NUMBER[split], number)
                for number, segment in enumerate(self.config.segments(split))
            ]
        return self._splits[split]


class MQARScorer(Scorer):
    """Means over the scored positions: ``loss`` in nats, ``bits``, ``accuracy``.

    Of several segments the mean of their means is reported, each with the same weight, and every segment's own as
    ``accuracy/T64_P4``. A batch tells its segment by its length and its number of scored positions.
    """

    def __init__(self, n_segments: int) -> None:
        self._n_segments = n_segments
        self._sums: dict[str, np.ndarray] = {}  # label -> (nll in nats, correct, positions)

    def update(self, batch: Batch, nll_nats: np.ndarray, correct: np.ndarray) -> None:
        scored = batch.targets != IGNORE
        n_pairs = int(scored[0].sum())
        assert (scored.sum(axis=1) == n_pairs).all(), "a batch holds examples of one segment"
        label = f"T{batch.tokens.shape[1]}_P{n_pairs}"
        sums = np.array([nll_nats[scored].sum(dtype=np.float64), correct[scored].sum(), scored.sum()], dtype=np.float64)
        self._sums[label] = self._sums.get(label, 0.0) + sums

    def result(self) -> dict[str, float]:
        assert len(self._sums) == self._n_segments, f"scored {sorted(self._sums)} of {self._n_segments} segments"
        loss = {label: nll / n for label, (nll, _, n) in self._sums.items()}
        accuracy = {label: right / n for label, (_, right, n) in self._sums.items()}
        mean_loss = float(np.mean(list(loss.values())))
        metrics = {
            "loss": mean_loss,
            "bits": mean_loss / math.log(2),
            "accuracy": float(np.mean(list(accuracy.values()))),
        }
        if self._n_segments > 1:
            metrics |= {f"loss/{label}": float(value) for label, value in loss.items()}
            metrics |= {f"accuracy/{label}": float(value) for label, value in accuracy.items()}
        return metrics


def _check_layout(seq_len: int, n_pairs: int) -> None:
    if seq_len % 2:
        raise ValueError(f"seq_len must be even, as queries sit at every second position; got {seq_len}")
    if 4 * n_pairs > seq_len:
        raise ValueError(
            f"pairs and queries need 4 * n_pairs <= seq_len; got n_pairs={n_pairs}, seq_len={seq_len}: "
            f"lower n_pairs to {seq_len // 4} or raise seq_len to {4 * n_pairs}"
        )


def _batch(examples: Examples, rows: np.ndarray) -> Batch:
    tokens = examples.tokens[rows].astype(np.int64)
    positions = examples.query_positions[rows].astype(np.int64)
    values = tokens[:, 1 : 2 * positions.shape[1] : 2]
    targets = np.full_like(tokens, IGNORE)
    np.put_along_axis(targets, positions, values, axis=1)
    return Batch(tokens, targets)


def _generate(config: MQARConfig, segment: Segment, seed: int, split: int, number: int) -> Examples:
    """All examples of a segment, a block at a time so that temporaries stay small."""
    n, T, P = segment.n_examples, segment.seq_len, segment.n_pairs
    V = config.vocab_size
    tokens = np.empty((n, T), dtype=np.uint16 if V <= 2**16 else np.uint32)
    query_positions = np.empty((n, P), dtype=np.uint16 if T <= 2**16 else np.uint32)
    n_keys, n_values = V // 2 - 1, V - V // 2
    key_deck, value_deck = _deck(n_keys), _deck(n_values)
    for block, start in enumerate(range(0, n, BLOCK_EXAMPLES)):
        stream = Stream(seed, split, number, block)
        keys = 1 + _draw_from(key_deck, P, stream)
        values = V // 2 + _draw_from(value_deck, P, stream)
        positions = 2 * P + 2 * _draw_slots((T - 2 * P) // 2, P, config.power_a, stream)

        example = np.zeros((BLOCK_EXAMPLES, T), dtype=np.int64)
        if config.filler == "random":
            example[:] = stream.integers(0, V, BLOCK_EXAMPLES, T)
        example[:, 0 : 2 * P : 2] = keys
        example[:, 1 : 2 * P : 2] = values
        np.put_along_axis(example, positions, keys, axis=1)

        n_kept = min(BLOCK_EXAMPLES, n - start)
        tokens[start : start + n_kept] = example[:n_kept]
        query_positions[start : start + n_kept] = positions[:n_kept]
    return Examples(tokens, query_positions)


def _deck(n: int) -> np.ndarray:
    """A row 0..n-1 for every example of a block."""
    return np.tile(np.arange(n, dtype=np.int32), (BLOCK_EXAMPLES, 1))


def _draw_from(deck: np.ndarray, k: int, stream: Stream) -> np.ndarray:
    """``k`` different entries of each row (rows,k), uniform over ordered choices: the first k steps of a
    Fisher-Yates shuffle. The deck is put back in order, which is cheaper than a new one."""
    rows = np.arange(len(deck))
    touched = np.empty((len(deck), k), dtype=np.int64)
    for i in range(k):
        j = touched[:, i] = stream.integers(i, deck.shape[1], len(deck))
        deck[rows, i], deck[rows, j] = deck[rows, j], deck[rows, i]
    drawn = deck[:, :k].astype(np.int64)
    deck[rows[:, None], touched] = touched
    deck[:, :k] = np.arange(k)
    return drawn


def _draw_slots(n_slots: int, k: int, power_a: float, stream: Stream) -> np.ndarray:
    """``k`` different slots for each example (rows,k) in order of drawing, slot g-1 with weight g^(a-1).

    Slots race with exponential clocks at the rate of their weight: the order of arrival is that of weighted
    drawing without replacement.
    """
    weights = np.arange(1, n_slots + 1, dtype=np.float64) ** (power_a - 1)
    arrival = -np.log1p(-stream.uniform(BLOCK_EXAMPLES, n_slots)) / weights
    first = np.argpartition(arrival, k - 1, axis=1)[:, :k]
    order = np.argsort(np.take_along_axis(arrival, first, axis=1), axis=1)
    return np.take_along_axis(first, order, axis=1)
