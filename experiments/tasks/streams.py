"""Random streams by name, and the order in which an epoch visits its examples.

Everything is derived from the raw output of Philox, which NumPy keeps stable between releases, unlike the
methods of ``numpy.random.Generator``: data and order are then the same wherever they are made.
"""

from __future__ import annotations

import numpy as np


class Stream:
    """Independent random numbers for every ``(seed, *key)``."""

    def __init__(self, seed: int, *key: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence(entropy=seed, spawn_key=key))

    def uniform(self, *shape: int) -> np.ndarray:
        """Float64 in [0, 1), of that shape."""
        return (self._raw(*shape) >> np.uint64(11)) * 2.0**-53

    def integers(self, low: int, high: int, *shape: int) -> np.ndarray:
        """Int64 uniform in [low, high); the bias of rounding is below (high - low) / 2**53."""
        return low + (self.uniform(*shape) * (high - low)).astype(np.int64)

    def permutation(self, n: int) -> np.ndarray:
        """The numbers 0 to n-1 in random order."""
        return np.argsort(self._raw(n), kind="stable")

    def _raw(self, *shape: int) -> np.ndarray:
        return self._bits.random_raw(int(np.prod(shape))).reshape(shape)


class EpochOrder:
    """Which examples make batch number ``step``: every epoch visits groups of examples in a fresh order.

    A batch comes from one group. An epoch holds ``n // batch_size`` full batches of a group of n examples, all
    groups' batches mixed; the remainder sits out, a different one each epoch. A pure function of its arguments;
    the current epoch is kept at hand.
    """

    def __init__(self, group_sizes: tuple[int, ...]) -> None:
        self.group_sizes = group_sizes
        self._epoch: tuple[tuple[int, int, int], list[tuple[int, np.ndarray]]] | None = None

    def batch(self, step: int, batch_size: int, order_seed: int) -> tuple[int, np.ndarray]:
        """(group, indices of ``batch_size`` examples of it)."""
        n_batches = sum(n // batch_size for n in self.group_sizes)
        epoch, position = divmod(step, n_batches)
        wanted = (epoch, batch_size, order_seed)
        if self._epoch is None or self._epoch[0] != wanted:
            self._epoch = wanted, self._batches(*wanted)
        return self._epoch[1][position]

    def _batches(self, epoch: int, batch_size: int, order_seed: int) -> list[tuple[int, np.ndarray]]:
        batches = []
        for group, n in enumerate(self.group_sizes):
            examples = Stream(order_seed, epoch, 0, group).permutation(n)
            batches += [(group, examples[i : i + batch_size]) for i in range(0, n - batch_size + 1, batch_size)]
        return [batches[i] for i in Stream(order_seed, epoch, 1).permutation(len(batches))]
