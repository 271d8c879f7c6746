"""Numbers from numbers: intervals, tests, fronts and thresholds on plain arrays. Knows nothing of sweeps or files."""

from analysis.stats.intervals import Interval, interval, split_missing

__all__ = ["Interval", "interval", "split_missing"]
