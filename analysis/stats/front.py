"""How sure it is that an arm is on the Pareto front: the seeds resampled, the same ones for every arm."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

FRONT_SEED = 18_960_115
N_DRAWS = 2_000


def front_probability(
    x: np.ndarray, y: np.ndarray, *, x_sign: int, y_sign: int, n_draws: int = N_DRAWS, seed: int = FRONT_SEED
) -> np.ndarray:
    """For each of A arms the probability that no other is at least as good on both axes and better on one; (A,).

    x, y (S,A): one row per seed, NaN where a run is missing. A sign of +1 says that higher is better.

    A multiplier bootstrap over seeds. A draw moves the mean of arm a by

        sqrt(k / c) * sum_s z_s (v_sa - mean_a) / sqrt(n_a (n_a - 1)),   z_s ~ N(0, 1),  c ~ chi^2(k)

    with z_s and c shared by all arms and both axes, n_a the seeds of the arm, and k one less than the fewest seeds of
    an arm. Shared z_s keep what the arms have in common on a seed. The difference of two complete arms is then drawn
    from t(n - 1) around its mean at its paired standard error, so a probability agrees with the one-sided paired
    t-test. Resampling 3 seeds with replacement has 10 outcomes and is too sure of itself: what it calls 99.7 % holds
    in 98.3 % of simulated cases.

    NaN for an arm with fewer than two seeds, as its spread is unknown; against the others it stands as it is.
    """
    present = np.isfinite(x) & np.isfinite(y)
    n = present.sum(0)
    if not (n >= 2).any():
        return np.full(x.shape[1], np.nan)
    k = int(n[n >= 2].min()) - 1
    z, stretch = _multipliers(n_draws, x.shape[0], k, seed)

    def drawn(values: np.ndarray) -> np.ndarray:
        filled = np.where(present, values, 0.0)
        mean = filled.sum(0) / np.maximum(n, 1)
        centred = np.where(present, filled - mean, 0.0) / np.sqrt(np.maximum(n * (n - 1), 1))
        # an arm that no seed knows is worse than anything
        return np.where(n > 0, mean + stretch * (z @ centred), -np.inf)

    beaten = _beaten(drawn(x_sign * x), drawn(y_sign * y))
    return np.where(n >= 2, 1.0 - beaten.mean(0), np.nan)


@lru_cache(maxsize=8)
def _multipliers(n_draws: int, n_seeds: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """z (R,S) and sqrt(k / c) (R,1): the same for every cell of a sweep."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n_draws, n_seeds)), np.sqrt(k / rng.chisquare(k, n_draws))[:, None]


def _beaten(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which of the points (R,A) another one of the same draw dominates; higher is better on both axes."""
    found = np.empty(x.shape, dtype=bool)
    for arm in range(x.shape[1]):
        better_x, better_y = x > x[:, arm, None], y > y[:, arm, None]
        as_good_x, as_good_y = x >= x[:, arm, None], y >= y[:, arm, None]
        found[:, arm] = ((better_x & as_good_y) | (better_y & as_good_x)).any(1)
    return found
