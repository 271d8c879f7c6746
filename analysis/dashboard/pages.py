"""The pages as the server gives them: relative addresses only, so that they work under any prefix."""

from __future__ import annotations

from analysis.page import COMPARE_SCRIPTS, PLOTLY_JS, STATIC, filled

_SHARED = ("format.js", "view.js", "theme.js", "live.js")
# the page's template, whether it draws with plotly, and its scripts
PAGES: dict[str, tuple[str, str, bool, tuple[str, ...]]] = {
    "sweeps": ("sweeps.html", "mixlab: sweeps", False, (*_SHARED, "sweeps.js")),
    "compare": ("compare.html", "mixlab: compare", True, COMPARE_SCRIPTS),
    "mixers": ("mixers.html", "mixlab: mixers", True, (*COMPARE_SCRIPTS[:-1], "mixers.js")),
}
STATIC_FILES = tuple(sorted(path.name for path in STATIC.iterdir() if path.suffix in (".js", ".css")))


def page(name: str) -> str:
    template, title, draws, scripts = PAGES[name]
    # the size stands in for a version: it changes with every release of plotly
    plotly = [f"compare/plotly.js?v={PLOTLY_JS.stat().st_size}"] if draws else []
    addresses = [*plotly, *(f"compare/static/{script}" for script in scripts)]
    return filled(
        template,
        title=title,
        styles='<link rel="stylesheet" href="compare/static/compare.css">',
        scripts="\n".join(f'<script src="{address}"></script>' for address in addresses),
        data="null",
    )
