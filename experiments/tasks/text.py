"""Byte-level language modelling on real text, with results by position: does a longer past help?"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from experiments.errors import UserError
from experiments.tasks.base import IGNORE, Batch, Scorer, Split, Task, TaskConfig
from experiments.tasks.documents import Document, read_documents
from experiments.tasks.streams import EpochOrder

SEPARATOR = 256  # the token at the start of every document; 0..255 are bytes
SPLITS: tuple[Split, ...] = ("train", "select", "report")
FIRST_BUCKET = 64  # positions in the first bucket of the results by position; each next one ends at twice the last


class TextConfig(TaskConfig):
    """Options of the text task."""

    name: Literal["text"] = "text"
    path: str | None = Field(None, description="file, folder or glob; None: the Python standard library's own sources")
    text_field: str = Field("text", description="field of a .jsonl line that holds the text")
    seq_len: int = Field(256, gt=0, description="tokens T of a training sequence")
    eval_len: int | None = Field(None, gt=0, description="tokens of an evaluation sample; None: 4 * seq_len")
    max_bytes: int | None = Field(8_000_000, gt=0, description="bytes of the corpus to use, None: all")
    document_bytes: int | None = Field(
        None, gt=0, description="cut longer documents into pieces of at most this many bytes"
    )
    n_select: int = Field(32, gt=0, description="samples of the select split")
    n_report: int = Field(128, gt=0, description="samples of the report split")
    select_fraction: float = Field(0.05, gt=0, lt=1, description="share of the documents in the select split")
    report_fraction: float = Field(0.05, gt=0, lt=1, description="share of the documents in the report split")

    @property
    def sample_len(self) -> int:
        """Tokens of an evaluation sample, resolved."""
        return 4 * self.seq_len if self.eval_len is None else self.eval_len

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.select_fraction + self.report_fraction >= 1:
            raise ValueError(
                "select_fraction + report_fraction must stay below 1, as the rest is for training; "
                f"got {self.select_fraction} + {self.report_fraction}"
            )
        return self


class TextTask(Task):
    """Next-byte prediction over 257 tokens: the bytes, and a separator that starts every document.

    Whole documents are assigned to the splits by a hash of their name, whatever the seed, so that no two splits
    share one. Order and boundaries of documents are kept. ``data_seed`` changes nothing: the corpus is what it is,
    and the default one depends on the version of Python (see ``data_hash``).

    Evaluation samples are windows of ``eval_len`` tokens spread evenly over their split, without overlap. They may
    start within a document.

    Raises UserError where the corpus has no text, or too little for a split.
    """

    can_stream: ClassVar[bool] = True
    higher_is_better: ClassVar[frozenset[str]] = frozenset({"accuracy"})
    vocab_size = 257

    def __init__(self, config: TextConfig, data_seed: int) -> None:
        self.config = config
        documents = [
            piece
            for document in read_documents(config.path, config.text_field, config.max_bytes)
            for piece in _pieces(document, config.document_bytes)
        ]
        if not documents:
            raise UserError(
                f"{self._place}: found no text: only UTF-8 files without NUL bytes count (.txt, .md, .jsonl, or .gz "
                "of these); set task.path to a file, folder or glob that has some"
            )
        self._streams = {split: _tokens([d for d in documents if self._split_of(d.name) == split]) for split in SPLITS}
        self._require_tokens(
            "train", config.seq_len + 1, f"a sequence of task.seq_len={config.seq_len} and its target", len(documents)
        )
        for split, n_samples in (("select", config.n_select), ("report", config.n_report)):
            need = f"task.n_{split}={n_samples} samples of eval_len={config.sample_len}"
            self._require_tokens(split, n_samples * config.sample_len + 1, need, len(documents))
        self._order = EpochOrder(((len(self._streams["train"]) - 1) // config.seq_len,))

    @property
    def tokens_per_example(self) -> float:
        return float(self.config.seq_len)

    def train_batch(self, step: int, batch_size: int, order_seed: int, *, contiguous: bool = False) -> Batch:
        """Batch ``step`` (batch_size,T) of T = seq_len tokens and their successors.

        By default windows at stride T over the train documents, in a fresh order each epoch. ``contiguous``: row b
        reads on from step to step, starting at b/batch_size of the train documents and going round at their end;
        ``order_seed`` then has no effect.

        Raises UserError where the train documents are too short for the batch.
        """
        T, stream = self.config.seq_len, self._streams["train"]
        n_windows = self._order.group_sizes[0]
        if n_windows < batch_size:
            raise UserError(
                f"{self._place}: {len(stream)} training tokens make {n_windows} sequences of task.seq_len={T}, fewer "
                f"than train.batch_size={batch_size}; lower either, or give more text (task.max_bytes)"
            )
        if contiguous:
            starts = np.arange(batch_size) * (len(stream) // batch_size) + step * T
        else:
            starts = self._order.batch(step, batch_size, order_seed)[1] * T
        return _windows(stream, starts, T)

    def eval_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        stream = self._streams[split]
        n_samples = self.config.n_select if split == "select" else self.config.n_report
        starts = np.arange(n_samples) * ((len(stream) - 1) // n_samples)
        for first in range(0, n_samples, batch_size):
            yield _windows(stream, starts[first : first + batch_size], self.config.sample_len)

    def scorer(self, split: Split) -> Scorer:
        return TextScorer(self.config.sample_len)

    def data_hash(self) -> str:
        digest = hashlib.sha256()
        for split, stream in self._streams.items():
            digest.update(f"{split} {len(stream)}\n".encode())
            digest.update(stream.astype("<u2").data)
        return digest.hexdigest()[:16]

    @property
    def _place(self) -> str:
        return f"task.path={self.config.path!r}" if self.config.path else "task.path (the standard library)"

    def _split_of(self, name: str) -> Split:
        """By the hash of the name as a number in [0, 1)."""
        position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        if position < self.config.report_fraction:
            return "report"
        return "select" if position < self.config.report_fraction + self.config.select_fraction else "train"

    def _require_tokens(self, split: Split, n_needed: int, purpose: str, n_documents: int) -> None:
        n_tokens = len(self._streams[split])
        if n_tokens < n_needed:
            way_out = f"lower task.n_{split} or task.eval_len, raise task.{split}_fraction"
            if split == "train":
                way_out = "lower task.seq_len, task.select_fraction or task.report_fraction"
            raise UserError(
                f"{self._place}: the {split} split got {n_tokens} tokens from {n_documents} documents in all, but "
                f"{purpose} need {n_needed}; {way_out}, give more text, or cut documents up with task.document_bytes"
            )


class TextScorer(Scorer):
    """``bits_per_byte``: bits of all scored targets over the number of those that are bytes, so that the separators'
    bits count in the numerator, as they are part of the message. ``loss`` (nats) and ``accuracy`` are means over all
    scored targets. ``bits_per_byte/pos_64_127`` and so on: the same, of the targets at these positions only.
    """

    def __init__(self, sample_len: int) -> None:
        self._nll_nats = np.zeros(sample_len)  # sums by position
        self._n_correct = np.zeros(sample_len)
        self._n_scored = np.zeros(sample_len)
        self._n_bytes = np.zeros(sample_len)

    def update(self, batch: Batch, nll_nats: np.ndarray, correct: np.ndarray) -> None:
        scored = batch.targets != IGNORE
        self._nll_nats += np.where(scored, nll_nats, 0.0).sum(axis=0, dtype=np.float64)
        self._n_correct += (scored & correct).sum(axis=0)
        self._n_scored += scored.sum(axis=0)
        self._n_bytes += (scored & (batch.targets < SEPARATOR)).sum(axis=0)

    def result(self) -> dict[str, float]:
        n_scored = self._n_scored.sum()
        assert n_scored > 0, "nothing was scored"
        metrics = {
            "loss": float(self._nll_nats.sum() / n_scored),
            "accuracy": float(self._n_correct.sum() / n_scored),
            "bits_per_byte": self._bits_per_byte(slice(None)),
        }
        for first, last in _buckets(len(self._n_scored)):
            metrics[f"bits_per_byte/pos_{first}_{last}"] = self._bits_per_byte(slice(first, last + 1))
        return metrics

    def _bits_per_byte(self, positions: slice) -> float:
        n_bytes = self._n_bytes[positions].sum()
        return float(self._nll_nats[positions].sum() / math.log(2) / n_bytes) if n_bytes else math.nan


def _buckets(n_positions: int) -> list[tuple[int, int]]:
    """(first, last) position of each bucket: 0-63, 64-127, 128-255, ..., the last one cut at the end."""
    edges = [0, FIRST_BUCKET]
    while edges[-1] < n_positions:
        edges.append(2 * edges[-1])
    return [(first, min(end, n_positions) - 1) for first, end in itertools.pairwise(edges)]


def _pieces(document: Document, n_bytes: int | None) -> Iterator[Document]:
    """The document, or its pieces of at most ``n_bytes``, cut after a line's end where there is one."""
    if n_bytes is None or len(document.content) <= n_bytes:
        yield document
        return
    start, number = 0, 0
    while start < len(document.content):
        end = min(start + n_bytes, len(document.content))
        if end < len(document.content):
            end = document.content.rfind(b"\n", start, end) + 1 or end
        yield Document(f"{document.name}#{number}", document.content[start:end])
        start, number = end, number + 1


def _tokens(documents: list[Document]) -> np.ndarray:
    """Separator, bytes, separator, bytes, ... as uint16."""
    stream = np.full(sum(len(d.content) + 1 for d in documents), SEPARATOR, dtype=np.uint16)
    position = 1
    for document in documents:
        stream[position : position + len(document.content)] = np.frombuffer(document.content, dtype=np.uint8)
        position += len(document.content) + 1
    return stream


def _windows(stream: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    """Rows of ``length`` tokens from ``starts`` and the token after each; beyond the end the stream begins again."""
    rows = stream[(starts[:, None] + np.arange(length + 1)) % len(stream)].astype(np.int64)
    return Batch(rows[:, :-1], rows[:, 1:])
