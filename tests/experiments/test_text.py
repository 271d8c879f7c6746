"""The text task on small corpora whose every byte is known."""

from __future__ import annotations

import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.tasks import build_task
from experiments.tasks.base import IGNORE, Batch
from experiments.tasks.documents import read_documents
from experiments.tasks.text import SEPARATOR, TextConfig, TextScorer, TextTask

SMALL = {"seq_len": 8, "eval_len": 32, "n_select": 2, "n_report": 3, "select_fraction": 0.2, "report_fraction": 0.2}


def corpus(folder: Path, n_documents: int = 60) -> Path:
    """Documents that say their own number all along."""
    for i in range(n_documents):
        (folder / f"{i:03}.txt").write_text(f"<{i:03}>" * (3 + i % 5))
    return folder


def task_on(path: Path | None, **options: object) -> TextTask:
    values = {**SMALL, **options} | ({"path": str(path)} if path else {})
    return TextTask(TextConfig.parse(values, "task"), 0)


def text_of(tokens: np.ndarray) -> str:
    return "".join("|" if token == SEPARATOR else chr(token) for token in tokens)


def test_documents_keep_order_and_boundaries_and_no_split_shares_one(tmp_path):
    task = task_on(corpus(tmp_path), n_select=1, n_report=1, seq_len=1)
    streams = {"train": task._streams["train"], "select": task._streams["select"], "report": task._streams["report"]}
    names: dict[str, list[str]] = {}
    for split, stream in streams.items():
        documents = text_of(stream).split("|")
        assert documents[0] == "", "a separator starts the first document"
        names[split] = [document[1:4] for document in documents[1:]]
        for document, name in zip(documents[1:], names[split], strict=True):
            assert document == f"<{name}>" * (3 + int(name) % 5), "whole and unmixed"
        assert names[split] == sorted(names[split])
    assert sorted(name for split in names.values() for name in split) == [f"{i:03}" for i in range(60)]


def test_assignment_to_splits_does_not_depend_on_other_documents(tmp_path):
    few, many = tmp_path / "few", tmp_path / "many"
    few.mkdir()
    many.mkdir()
    one, two = task_on(corpus(few, 50)), task_on(corpus(many, 60))
    for split in ("train", "select", "report"):
        assert text_of(two._streams[split]).startswith(text_of(one._streams[split]))


def test_training_windows_overlap_by_their_target_and_cover_the_stream_once_an_epoch(tmp_path):
    task = task_on(corpus(tmp_path))
    stream, T, B = task._streams["train"], 8, 4
    n_windows = (len(stream) - 1) // T
    starts_of = {stream[i * T : (i + 1) * T + 1].tobytes(): i for i in range(n_windows)}
    assert len(starts_of) == n_windows, "windows are told apart"

    def epoch(number: int, order_seed: int) -> list[int]:
        seen = []
        for step in range(number * (n_windows // B), (number + 1) * (n_windows // B)):
            batch = task.train_batch(step, B, order_seed)
            assert batch.tokens.shape == batch.targets.shape == (B, T)
            rows = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1).astype(np.uint16)
            np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
            seen += [starts_of[row.tobytes()] for row in rows]
        return seen

    first, second, other = epoch(0, 1), epoch(1, 1), epoch(0, 2)
    assert len(set(first)) == len(first) == n_windows // B * B
    assert first != second
    assert first != other
    assert first == epoch(0, 1)


def test_contiguous_rows_read_on_from_step_to_step_through_the_whole_stream(tmp_path):
    task = task_on(corpus(tmp_path))
    stream, T, B = task._streams["train"], 8, 3
    n_steps = len(stream) // T + 5  # more than once round
    batches = [task.train_batch(step, B, 0, contiguous=True) for step in range(n_steps)]
    for b in range(B):
        read = np.concatenate([batch.tokens[b] for batch in batches])
        start = b * (len(stream) // B)
        np.testing.assert_array_equal(read, np.roll(np.tile(stream, 2), -start)[: len(read)])
        targets = np.concatenate([batch.targets[b] for batch in batches])
        np.testing.assert_array_equal(read[1:], targets[:-1])
    np.testing.assert_array_equal(
        task.train_batch(7, B, 99, contiguous=True).tokens, batches[7].tokens, "the order seed changes nothing"
    )


def test_evaluation_samples_are_evenly_spaced_windows(tmp_path):
    task = task_on(corpus(tmp_path))
    for split, n_samples in (("select", 2), ("report", 3)):
        stream = task._streams[split]
        batches = list(task.eval_batches(split, 2))
        assert sum(len(batch.tokens) for batch in batches) == n_samples
        stride = (len(stream) - 1) // n_samples
        assert stride >= 32, "no overlap"
        for i, (row, target) in enumerate((r, t) for batch in batches for r, t in zip(*batch, strict=True)):
            np.testing.assert_array_equal(row, stream[i * stride : i * stride + 32])
            np.testing.assert_array_equal(target, stream[i * stride + 1 : i * stride + 33])


def test_kinds_of_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("plain é")
    (tmp_path / "sub" / "a.md").write_text("below")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in ("one", "", "two"))
    (tmp_path / "d.jsonl").write_text(lines + "\n")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "nul.txt").write_bytes(b"text\0text")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") + b" is not UTF-8")
    (tmp_path / "no.gz").write_bytes(b"no gzip")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "empty.txt").write_text("")
    found = [(d.name, d.content.decode()) for d in read_documents(str(tmp_path), "text", None)]
    expected = [("b.txt", "plain é"), ("c.txt.gz", "packed"), ("d.jsonl#1", "one"), ("d.jsonl#3", "two")]
    expected += [("e.jsonl.gz#1", "one"), ("e.jsonl.gz#3", "two"), ("sub/a.md", "below")]
    assert found == expected
    assert [d.name for d in read_documents(str(tmp_path / "*.txt"), "text", None)] == ["b.txt"]
    assert [d.name for d in read_documents(str(tmp_path / "**" / "*.md"), "text", None)] == ["sub/a.md"]
    assert [d.name for d in read_documents(str(tmp_path / "b.txt"), "text", None)] == ["b.txt"]


def test_max_bytes_ends_within_a_document(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name * 10)
    capped = read_documents(str(tmp_path), "text", 14)
    assert [(d.name, d.content) for d in capped] == [("a", b"a" * 10), ("b", b"b" * 4)]
    assert sum(len(d.content) for d in read_documents(str(tmp_path), "text", 30)) == 30


def test_one_long_file_is_cut_into_documents_at_line_ends(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i:04}\n" for i in range(500)))
    with pytest.raises(UserError, match=r"split got 0 tokens from 1 documents.*task\.document_bytes"):
        task_on(file)
    task = task_on(file, document_bytes=105)
    pieces = [piece for split in task._streams for piece in text_of(task._streams[split]).split("|")[1:]]
    assert sorted(pieces) == sorted("".join(f"line {i:04}\n" for i in range(k, k + 10)) for k in range(0, 500, 10))
    (tmp_path / "unbroken.txt").write_text("x" * 5000)
    assert len(text_of(task_on(tmp_path / "unbroken.txt", document_bytes=105)._streams["train"])) > 1000


def test_scorer_against_hand_computed_values():
    scorer = TextScorer(130)
    targets = np.full((2, 130), 65)
    targets[0, 0] = SEPARATOR
    targets[1, 129] = IGNORE
    nll = np.full((2, 130), math.log(2))  # one bit each
    nll[0, 0] = 3 * math.log(2)
    nll[1, 129] = np.nan  # not scored
    correct = np.zeros((2, 130), dtype=bool)
    correct[:, :13] = True
    batch = Batch(np.zeros((2, 130), dtype=np.int64), targets)
    scorer.update(batch, nll, correct)
    result = scorer.result()
    assert result["bits_per_byte"] == pytest.approx((258 + 3) / 258)
    assert result["loss"] == pytest.approx((258 + 3) * math.log(2) / 259)
    assert result["accuracy"] == pytest.approx(26 / 259)
    assert result["bits_per_byte/pos_0_63"] == pytest.approx((127 + 3) / 127)
    assert result["bits_per_byte/pos_64_127"] == pytest.approx(1.0)
    assert result["bits_per_byte/pos_128_129"] == pytest.approx(1.0)
    assert len(result) == 6
    nll[0, 5] = np.nan
    scorer.update(batch, nll, correct)
    assert math.isnan(scorer.result()["bits_per_byte"]), "NaN never passes"


def test_a_short_sample_has_one_bucket():
    scorer = TextScorer(10)
    batch = Batch(np.zeros((1, 10), dtype=np.int64), np.ones((1, 10), dtype=np.int64))
    scorer.update(batch, np.full((1, 10), 1.0), np.ones((1, 10), dtype=bool))
    assert set(scorer.result()) == {"loss", "accuracy", "bits_per_byte", "bits_per_byte/pos_0_9"}


def test_hash_follows_the_bytes_and_not_the_seed(tmp_path):
    corpus(tmp_path)
    config = TextConfig.parse({**SMALL, "path": str(tmp_path)}, "task")
    assert build_task(config, 0).data_hash() == build_task(config, 1).data_hash() == "76ffb81398cb2aad"
    (tmp_path / "003.txt").write_text("<004>" * 6)
    assert build_task(config, 0).data_hash() != "76ffb81398cb2aad"


def test_the_standard_library_is_the_default_corpus_and_loads_quickly():
    started = time.perf_counter()
    task = TextTask(TextConfig(), 0)
    batch = task.train_batch(0, 16, 0)
    assert len(task.data_hash()) == 16
    assert time.perf_counter() - started < 2
    assert batch.tokens.shape == (16, 256)
    names = [document.name for document in read_documents(None, "text", None)]
    assert "abc.py" in names
    assert "asyncio/base_events.py" in names
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(name.split("/")[:-1])]
    samples = list(task.eval_batches("report", 50))
    assert [len(batch.tokens) for batch in samples] == [50, 50, 28]
    assert samples[0].tokens.shape[1] == 1024


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        ({}, {}, "found no text"),
        ({"a.txt": b"\0"}, {}, "found no text"),
        ({"a.jsonl": b'{"body": "x"}'}, {}, r"a.jsonl, line 1: no text in field 'text' \(has: body\)"),
        ({"a.jsonl": b'{"text": "x"}\n{"text": '}, {}, "a.jsonl, line 2: not a JSON object"),
        ({"a.txt.gz": gzip.compress(b"long enough" * 50)[:-9]}, {}, "is damaged"),
        ({"a.txt": b"too short"}, {}, "train split got|select split got"),
    ],
)
def test_corpora_without_enough_text_say_what_to_do(tmp_path, files, options, words):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        task_on(tmp_path, **options)
    assert "\n" not in str(raised.value)


def test_other_mistakes(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        task_on(tmp_path / "absent")
    with pytest.raises(UserError, match="must stay below 1"):
        task_on(tmp_path, select_fraction=0.5, report_fraction=0.5)
    task = task_on(corpus(tmp_path))
    for contiguous in (False, True):
        with pytest.raises(UserError, match=r"fewer than train\.batch_size=10000"):
            task.train_batch(0, 10_000, 0, contiguous=contiguous)
    with pytest.raises(UserError, match=r"task.n_report=500 samples of eval_len=32 need 16001"):
        task_on(tmp_path, n_report=500)
