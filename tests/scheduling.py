"""Which tests stay together and which come first, where several processes share them (``--dist loadgroup``).

A file's tests stay in one process, which sets its fixtures up once. The longest files come first and tests that are
sent one by one come last, so that all processes end together.
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# One server and one browser for all of them.
BROWSER = (
    "tests/analysis/test_dashboard.py",
    "tests/analysis/test_dashboard_pages.py",
    "tests/analysis/test_dashboard_chart.py",
    "tests/analysis/test_page.py",
)
# Each takes about half a minute of a core or more, the longest first.
LONG = (
    *BROWSER,
    "tests/experiments/test_tracking_faults.py",
    "tests/sweeps/test_ray.py",
    "tests/test_tutorial.py",
    "tests/mixers/test_fwpkm_triton.py",
    "tests/mixers/test_fwpkm_interpreted.py",
    "tests/sweeps/test_interrupt.py",
    "tests/mixers/test_fwpkm_random.py",
    "tests/test_command_line.py",
    "tests/mixers/test_entry_points.py",
    "tests/mixers/test_scaffold.py",
    "tests/analysis/test_dashboard_auth.py",
    "tests/experiments/test_bench_mixers.py",
    "tests/sweeps/test_mirror.py",
    "tests/sweeps/test_cli.py",
    "tests/experiments/test_tracking.py",
    "tests/experiments/test_run.py",
    "tests/sweeps/test_chaos.py",
    "tests/mixers/test_source.py",
    "tests/experiments/test_bench.py",
    "tests/mixers/contract/test_check_command.py",
    "tests/mixers/test_fwpkm_impl.py",
    "tests/mixers/contract/test_faulty.py",
    "tests/mixers/test_decay_layers.py",
)
# Long files whose tests share nothing that takes time.
ONE_BY_ONE = (
    "tests/sweeps/test_driver.py",
    "tests/mixers/test_contract.py",
)
RANKS = {name: rank for rank, name in enumerate((*LONG, "the others", *ONE_BY_ONE))}


def rank(item: pytest.Item) -> int:
    """Sorts tests into the order in which they are begun."""
    return RANKS.get(_file(item.nodeid), RANKS["the others"])


class Scheduling(LoadScopeScheduling):
    """By scope, in the order of the tests; not by xdist's mark ``xdist_group``, which pytest 9.2 loses."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        file = _file(nodeid)
        if file in BROWSER:
            return "browser"
        return nodeid if file in ONE_BY_ONE else file


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]
