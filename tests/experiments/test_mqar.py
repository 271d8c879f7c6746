"""MQAR against what its definition says, read off one example at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments.errors import UserError
from experiments.tasks import build_task
from experiments.tasks.base import IGNORE, Batch
from experiments.tasks.mqar import BLOCK_EXAMPLES, MQARConfig, MQARTask


def config(**options: object) -> MQARConfig:
    return MQARConfig.parse({"n_train": 600, "n_select": 70, "n_report": 50, **options}, "task")


def all_of(task: MQARTask, split: str) -> Batch:
    batches = list(task.eval_batches(split, 64))
    return Batch(np.concatenate([b.tokens for b in batches]), np.concatenate([b.targets for b in batches]))


SHAPES = [(64, 4, 8192), (16, 4, 10), (256, 64, 8192), (8, 1, 5), (128, 8, 70_000)]


@pytest.mark.parametrize("filler", ["zeros", "random"])
@pytest.mark.parametrize(("seq_len", "n_pairs", "vocab_size"), SHAPES)
def test_every_target_is_the_value_bound_to_the_queried_key(seq_len, n_pairs, vocab_size, filler):
    task = build_task(config(seq_len=seq_len, n_pairs=n_pairs, vocab_size=vocab_size, filler=filler), 3)
    batch = all_of(task, "report")
    assert batch.tokens.shape == batch.targets.shape == (50, seq_len)
    assert batch.tokens.dtype == batch.targets.dtype == np.int64
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        memory = {}
        for i in range(n_pairs):
            key, value = tokens[2 * i], tokens[2 * i + 1]
            assert 1 <= key < vocab_size // 2 <= value < vocab_size
            memory[key] = value
        assert len(memory) == n_pairs, "keys are distinct"
        assert len(set(memory.values())) == n_pairs, "values are distinct"
        queried = []
        for position, (token, target) in enumerate(zip(tokens, targets, strict=True)):
            if target != IGNORE:
                assert position >= 2 * n_pairs
                assert position % 2 == 0
                assert target == memory[token]
                queried.append(token)
            elif position >= 2 * n_pairs:
                assert 0 <= token < vocab_size
                assert filler == "random" or token == 0
        assert sorted(queried) == sorted(memory), "each key is asked for once"


def test_keys_values_and_filler_are_uniform():
    task = MQARTask(config(vocab_size=32, seq_len=32, n_pairs=4, n_report=20_000), 0)
    batch = all_of(task, "report")
    keys, values = batch.tokens[:, 0:8:2], batch.tokens[:, 1:8:2]
    filler = batch.tokens[:, 8:][batch.targets[:, 8:] == IGNORE]
    for drawn, low, high in ((keys, 1, 16), (values, 16, 32), (filler, 0, 32)):
        counts = np.bincount(drawn.ravel(), minlength=32)
        assert counts[:low].sum() == counts[high:].sum() == 0
        assert stats.chisquare(counts[low:high]).pvalue > 1e-3
    for i in range(4):  # at each place alone: an order among drawn keys would show here
        assert stats.chisquare(np.bincount(keys[:, i], minlength=16)[1:]).pvalue > 1e-3
    both = np.bincount(16 * keys[:, 0] + keys[:, 1], minlength=256).reshape(16, 16)[1:, 1:]
    assert np.trace(both) == 0
    assert stats.chisquare(both[~np.eye(15, dtype=bool)]).pvalue > 1e-3


@pytest.mark.parametrize("power_a", [0.01, 0.7])
def test_gaps_follow_the_power_law_without_replacement(power_a):
    n_pairs, n_slots = 2, 6
    task = MQARTask(config(vocab_size=64, seq_len=16, n_pairs=n_pairs, power_a=power_a, n_report=30_000), 1)
    batch = all_of(task, "report")
    slot = np.empty((len(batch.tokens), n_pairs), dtype=int)
    for pair in range(n_pairs):
        asked = (batch.targets != IGNORE) & (batch.tokens == batch.tokens[:, [2 * pair]])
        slot[:, pair] = (asked.argmax(axis=1) - 2 * n_pairs) // 2
    weight = power_a * np.arange(1, n_slots + 1) ** (power_a - 1)
    p = weight / weight.sum()
    first, second = np.meshgrid(p, p, indexing="ij")
    joint = first * second / (1 - first)
    np.fill_diagonal(joint, 0.0)
    counts = np.bincount(n_slots * slot[:, 0] + slot[:, 1], minlength=n_slots**2).reshape(n_slots, n_slots)
    assert np.trace(counts) == 0
    off = ~np.eye(n_slots, dtype=bool)
    expected = joint[off] * len(slot)
    assert stats.chisquare(counts[off], expected * counts[off].sum() / expected.sum()).pvalue > 1e-3


def test_data_are_a_pure_function_of_config_seed_and_split():
    one, same, other = (MQARTask(config(), seed) for seed in (5, 5, 6))
    batches = [one.train_batch(step, 32, 9) for step in (0, 40, 3)]  # in any order, and again
    for step, batch in zip((0, 40, 3), batches, strict=True):
        for task in (same, one):
            np.testing.assert_array_equal(task.train_batch(step, 32, 9).tokens, batch.tokens)
            np.testing.assert_array_equal(task.train_batch(step, 32, 9).targets, batch.targets)
    assert one.data_hash() == same.data_hash() != other.data_hash()
    assert not (all_of(one, "report").tokens == all_of(other, "report").tokens).all()


def test_hash_is_pinned():
    """Fails where the data of published configs change: raise RESULTS_VERSION then."""
    assert MQARTask(config(), 0).data_hash() == "acd86235b3cfc402"


@pytest.mark.parametrize(
    "changed",
    [{"power_a": 0.5}, {"filler": "zeros"}, {"n_pairs": 3}, {"n_report": 51}, {"n_train": 601}, {"vocab_size": 64}],
)
def test_hash_tells_every_option(changed):
    assert MQARTask(config(**changed), 0).data_hash() != MQARTask(config(), 0).data_hash()


def test_splits_share_no_examples():
    task = MQARTask(config(), 0)
    rows = [{row.tobytes() for row in all_of(task, split).tokens} for split in ("select", "report")]
    rows.append({row.tobytes() for step in range(18) for row in task.train_batch(step, 32, 0).tokens})
    assert [len(r) for r in rows] == [70, 50, 18 * 32]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_more_examples_keep_the_first_ones():
    n = BLOCK_EXAMPLES + 7
    few, many = (all_of(MQARTask(config(n_report=k), 0), "report") for k in (n, n + 30))
    np.testing.assert_array_equal(few.tokens, many.tokens[:n])


def test_an_epoch_visits_every_example_once_in_an_order_of_its_own():
    task = MQARTask(config(n_train=96), 0)

    def epoch(number: int, order_seed: int) -> list[bytes]:
        steps = range(3 * number, 3 * number + 3)
        return [row.tobytes() for step in steps for row in task.train_batch(step, 32, order_seed).tokens]

    def batches(order: list[bytes]) -> set[frozenset[bytes]]:
        return {frozenset(order[i : i + 32]) for i in range(0, 96, 32)}

    orders = [epoch(0, 1), epoch(1, 1), epoch(0, 2)]
    assert all(len(set(order)) == 96 for order in orders)
    assert len({frozenset(order) for order in orders}) == 1
    assert len({tuple(order) for order in orders}) == 3
    assert len(set.union(*(batches(order) for order in orders))) == 9, "batches are put together anew"


MIXTURE = [
    {"seq_len": 16, "n_pairs": 2, "n_examples": 64},
    {"seq_len": 16, "n_pairs": 4, "n_examples": 40},
    {"seq_len": 32, "n_pairs": 4, "n_examples": 32},
]


def mixed() -> MQARTask:
    options = {"train_mixture": MIXTURE, "eval_mixture": MIXTURE, "vocab_size": 64}
    return MQARTask(MQARConfig.parse(options, "task"), 0)


def test_a_training_batch_of_a_mixture_comes_from_one_segment():
    task = mixed()
    labels = []
    for step in range(4 + 2 + 2):
        batch = task.train_batch(step, 16, 0)
        n_queries = set((batch.targets != IGNORE).sum(axis=1).tolist())
        assert len(n_queries) == 1
        labels.append((batch.tokens.shape[1], n_queries.pop()))
    assert {label: labels.count(label) for label in labels} == {(16, 2): 4, (16, 4): 2, (32, 4): 2}
    assert labels != sorted(labels), "segments are mixed within the epoch"
    assert task.tokens_per_example == pytest.approx((104 * 16 + 32 * 32) / 136)


def test_mixture_is_scored_by_segment_and_as_their_plain_mean():
    task = mixed()
    scorer = task.scorer("select")
    for batch in task.eval_batches("select", 10):
        n_pairs = (batch.targets[0] != IGNORE).sum()
        right = np.full(batch.tokens.shape, (batch.tokens.shape[1], n_pairs) == (16, 2))
        nll = np.full(batch.tokens.shape, 7.0)  # counts only where scored
        nll[batch.targets != IGNORE] = batch.tokens.shape[1] / 16
        scorer.update(batch, nll, right)
    result = scorer.result()
    assert result["accuracy/T16_P2"] == 1.0
    assert result["accuracy/T16_P4"] == result["accuracy/T32_P4"] == 0.0
    assert result["accuracy"] == pytest.approx(1 / 3)
    assert result["loss/T32_P4"] == 2.0
    assert result["loss"] == pytest.approx(4 / 3)
    assert result["bits"] == pytest.approx(4 / 3 / math.log(2))


def test_scorer_reads_scored_positions_only_and_passes_nan_on():
    task = MQARTask(config(), 0)
    batch = next(task.eval_batches("select", 8))
    scored = batch.targets != IGNORE
    scorer = task.scorer("select")
    scorer.update(batch, np.where(scored, 0.5, np.nan), scored)
    assert scorer.result() == {"loss": 0.5, "bits": pytest.approx(0.5 / math.log(2)), "accuracy": 1.0}
    scorer.update(batch, np.full(scored.shape, np.nan), scored)
    assert math.isnan(scorer.result()["loss"])


def test_an_evaluation_that_missed_a_segment_is_no_result():
    scorer = mixed().scorer("select")
    with pytest.raises(AssertionError, match="segments"):
        scorer.result()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_len": 63}, "seq_len must be even"),
        ({"seq_len": 64, "n_pairs": 17}, "4 * n_pairs <= seq_len; got n_pairs=17, seq_len=64"),
        ({"vocab_size": 8, "n_pairs": 4}, "raise vocab_size to 10"),
        ({"train_mixture": [{"seq_len": 8, "n_pairs": 4, "n_examples": 1}]}, "lower n_pairs to 2"),
        ({"eval_mixture": [MIXTURE[0], MIXTURE[0]]}, "stands twice"),
        (
            {"eval_mixture": MIXTURE, "train_mixture": MIXTURE, "n_pairs": 8},
            "n_pairs=8 has no effect",
        ),
        ({"train_mixture": MIXTURE, "n_train": 600}, "n_train=600 has no effect"),
        ({"n_pair": 4}, "did you mean 'n_pairs'"),
        ({"eval_mixture": []}, "eval_mixture"),
    ],
)
def test_refused_configs_say_why_in_one_line(options, words):
    with pytest.raises(UserError) as raised:
        MQARConfig.parse(options, "task")
    message = str(raised.value)
    assert words in message
    assert message.startswith("task")
    assert "\n" not in message


def test_batches_that_cannot_be_had_are_refused():
    task = MQARTask(config(), 0)
    with pytest.raises(UserError, match="carry='stream'"):
        task.train_batch(0, 8, 0, contiguous=True)
    with pytest.raises(UserError, match=r"600 training examples.*batch_size=601"):
        task.train_batch(0, 601, 0)
    assert task.train_batch(5, 600, 0).tokens.shape == (600, 64)
