"""The pages as the server gives them: relative addresses only, so that they work under any prefix."""

from __future__ import annotations

from analysis.page import COMPARE_SCRIPTS, PLOTLY_JS, STATIC, filled

# the scripts of every page
PAGES: dict[str, tuple[str, ...]] = {
    "sweeps": ("format.js", "view.js", "theme.js", "live.js", "sweeps.js"),
    "compare": COMPARE_SCRIPTS,
    "mixers": (*COMPARE_SCRIPTS[:-1], "mixers.js"),
}
STATIC_FILES = tuple(sorted(path.name for path in STATIC.iterdir() if path.suffix in (".js", ".css")))


def page(name: str, *, draws: bool) -> str:
    """The page ``name``; with plotly where it ``draws``."""
    scripts = [f'<script src="compare/static/{script}"></script>' for script in PAGES[name]]
    if draws:
        # Deferred: fetched and compiled while our scripts, which run first, ask for the data.
        # The size stands in for a version: it changes with every release of plotly.
        scripts.insert(0, f'<script src="compare/plotly.js?v={PLOTLY_JS.stat().st_size}" defer></script>')
    navigation = (STATIC / "navigation.html").read_text(encoding="utf-8").rstrip()
    return filled(
        name,
        navigation=navigation.replace(f'data-page="{name}"', f'data-page="{name}" aria-current="page"'),
        styles='<link rel="stylesheet" href="compare/static/compare.css">',
        scripts="\n".join(scripts),
        data="null",
    )
