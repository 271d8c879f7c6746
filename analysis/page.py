"""The comparison page, as served (parts fetched) and as a report (everything in one file)."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STATIC = Path(__file__).parent / "dashboard" / "static"
BASE_SCRIPTS = ("format.js", "view.js", "theme.js", "live.js", "chart_marks.js")
COMPARE_SCRIPTS = (
    *BASE_SCRIPTS,
    "scale.js",
    "pareto.js",
    "model.js",
    "chooser.js",
    "plot.js",
    "table.js",
    "findings.js",
    "panels.js",
    "figures.js",
    "export.js",
    "source.js",
    "main.js",
)
# the element at which a page's own part begins
_START = {"sweeps": "list", "compare": "plot", "mixers": "content"}


def _plotly_js() -> Path:
    # found without importing plotly, which takes long and is not needed to serve one file of it
    spec = find_spec("plotly")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js"


PLOTLY_JS = _plotly_js()


def report_page(payload: dict[str, Any]) -> str:
    """The same page with data, styles, scripts and plotly inside: one file that needs no network and no server."""
    own = [
        (STATIC / name).read_text(encoding="utf-8") for name in (*COMPARE_SCRIPTS[:-1], "chart_plotly.js", "main.js")
    ]
    scripts = [PLOTLY_JS.read_text(encoding="utf-8"), *own]
    styles = f"<style>\n{(STATIC / 'compare.css').read_text(encoding='utf-8')}</style>"
    inline = "\n".join("<script>\n" + text.replace("</script", "<\\/script") + "\n</script>" for text in scripts)
    return filled("compare", navigation="", styles=styles, scripts=inline, data=script_json(payload))


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no character of it can end the element or start a comment."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def filled(name: str, *, navigation: str, styles: str, scripts: str, data: str) -> str:
    """The page ``name`` of STATIC in the frame that all have, with its parts in place."""
    page = (STATIC / "page.html").read_text(encoding="utf-8")
    parts = {
        "@TITLE@": f"mixlab: {name}",
        "@STYLES@": styles,
        "@START@": _START[name],
        "@HEADING@": name.capitalize(),
        "@NAVIGATION@": navigation,
        "@MAIN@": (STATIC / f"{name}.html").read_text(encoding="utf-8").rstrip(),
    }
    for mark, text in parts.items():
        page = page.replace(mark, text)
    # cut before filling: data and plotly may themselves contain a mark
    before, rest = page.split("@DATA@")
    between, after = rest.split("@SCRIPTS@")
    return before + data + between + scripts + after
