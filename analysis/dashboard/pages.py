"""The pages as the server gives them: relative addresses only, so that they work under any prefix."""

from __future__ import annotations

import hashlib

from analysis.page import BASE_SCRIPTS, COMPARE_SCRIPTS, STATIC, filled

_CHARTS = ("chart_axis.js", "chart.js", "chart_pointer.js", "chart_file.js")
# the scripts of every page, sent as one: each request to the server costs more than the script itself
PAGES: dict[str, tuple[str, ...]] = {
    "sweeps": (*BASE_SCRIPTS, "sweeps.js"),
    "compare": (*COMPARE_SCRIPTS[:-1], *_CHARTS, "main.js"),
    "mixers": (*COMPARE_SCRIPTS[:-1], *_CHARTS, "mixers.js"),
}


def part(name: str) -> str:
    """The text of ``compare.css``, or of the script of a page, ``PAGE.js``."""
    page_name, _, kind = name.partition(".")
    files = PAGES[page_name] if kind == "js" else (name,)
    return "\n".join((STATIC / file).read_text(encoding="utf-8") for file in files)


PARTS = ("compare.css", *(f"{name}.js" for name in PAGES))


def page(name: str) -> str:
    """The page ``name``, with its script and style at addresses that change when they do."""
    style, script = _address("compare.css"), _address(name + ".js")
    navigation = (STATIC / "navigation.html").read_text(encoding="utf-8").rstrip()
    return filled(
        name,
        navigation=navigation.replace(f'data-page="{name}"', f'data-page="{name}" aria-current="page"'),
        styles=f'<link rel="stylesheet" href="{style}">\n<link rel="preload" as="script" href="{script}">',
        scripts=f'<script src="{script}"></script>',
        data="null",
    )


def _address(name: str) -> str:
    return f"compare/static/{name}?v={hashlib.sha256(part(name).encode()).hexdigest()[:12]}"
