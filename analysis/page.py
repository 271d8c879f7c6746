"""The comparison page, as served (parts fetched) and as a report (everything in one file)."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

STATIC = Path(__file__).parent / "dashboard" / "static"
_SCRIPTS = ("format.js", "scale.js", "pareto.js", "view.js", "plot.js", "table.js", "main.js")


def _plotly_js() -> Path:
    # found without importing plotly, which takes long and is not needed to serve one file of it
    spec = find_spec("plotly")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js"


PLOTLY_JS = _plotly_js()


def dashboard_page() -> str:
    """The page as the server gives it: relative addresses only, so that it works under any prefix."""
    # the size stands in for a version: it changes with every release of plotly
    plotly = f'<script src="compare/plotly.js?v={PLOTLY_JS.stat().st_size}"></script>'
    scripts = "\n".join(f'<script src="compare/static/{quote(name)}"></script>' for name in _SCRIPTS)
    styles = '<link rel="stylesheet" href="compare/static/compare.css">'
    return _filled("mixlab: compare", styles, plotly + "\n" + scripts, "null")


def report_page(payload: dict[str, Any]) -> str:
    """The same page with data, styles, scripts and plotly inside: one file that needs no network and no server."""
    scripts = [PLOTLY_JS.read_text(encoding="utf-8")] + [
        (STATIC / name).read_text(encoding="utf-8") for name in _SCRIPTS
    ]
    styles = f"<style>\n{(STATIC / 'compare.css').read_text(encoding='utf-8')}</style>"
    inline = "\n".join("<script>\n" + text.replace("</script", "<\\/script") + "\n</script>" for text in scripts)
    return _filled("mixlab: comparison", styles, inline, script_json(payload))


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no character of it can end the element or start a comment."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _filled(title: str, styles: str, scripts: str, data: str) -> str:
    page = (STATIC / "compare.html").read_text(encoding="utf-8")
    for mark, text in (("@TITLE@", title), ("@STYLES@", styles)):
        page = page.replace(mark, text, 1)
    # cut before filling: data and plotly may themselves contain a mark
    before, rest = page.split("@DATA@")
    between, after = rest.split("@SCRIPTS@")
    return before + data + between + scripts + after
