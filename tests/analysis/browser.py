"""How the browser tests wait: a page answers when its machine has time, so that what follows an action is waited for.

Whoever reads a page after an action uses these, or playwright's own waiting; a read that happens once is right only of
what is there before the page opens, or can't change any more.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

LIMIT_S = 120.0  # patience with a busy machine; what is right is seen at once


def expect(actual: Any) -> Any:
    """Playwright's ``expect``, with our patience: imported late, since other tests do without a browser."""
    from playwright import sync_api

    sync_api.expect.set_options(timeout=1000 * LIMIT_S)
    return sync_api.expect(actual)


def eventually(read: Callable[[], Any], expected: Any) -> None:
    """Read until it gives ``expected``."""
    deadline = time.monotonic() + LIMIT_S
    while (found := read()) != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found == expected


def wait_until(page: Any, expression: str) -> None:
    """Our pages let no text become a script, which is how playwright's ``wait_for_function`` works."""
    deadline = time.monotonic() + LIMIT_S
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.02)


def expect_in_address(page: Any, *parts: str) -> None:
    """The browser tells of a changed address after the action that changed it."""
    for part in parts:
        expect(page).to_have_url(re.compile(re.escape(part)))


def wait_for_points(page: Any) -> None:
    page.wait_for_selector("#plot .points path", state="attached")


def points(page: Any) -> dict[tuple[str, str], tuple[float, float]]:
    """What plotly draws as means: (arm, cell) -> (x, y)."""
    drawn = page.evaluate(
        """() => (document.getElementById("plot").data ?? []).filter((t) => t.customdata && t.error_y)
            .flatMap((t) => t.customdata.map((who, i) => who && [...who, t.x[i], t.y[i]]).filter((mark) => mark))"""
    )
    return {(arm, cell): (x, y) for arm, cell, _, x, y in drawn}


def open_plot(page: Any, address: str) -> Any:
    page.goto(address)
    wait_for_points(page)
    return page


def open_any(page: Any, address: str) -> Any:
    page.goto(address)
    wait_until(page, "document.getElementById('status').textContent !== 'Loading …'")
    return page
