"""MLflow's server application with the comparison page added; the entry point `mixlab` of group `mlflow.app`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from flask import Flask, Response, request, send_file, send_from_directory

from analysis.comparison import check_axis, compare
from analysis.dashboard import mlflow_private
from analysis.page import PLOTLY_JS, STATIC, dashboard_page
from analysis.payload import payload
from analysis.runs import find_experiment, rows_from_mlflow_runs, sweep_experiments
from experiments.errors import UserError
from experiments.paths import runs_root
from sweeps.saved import SavedSweep, read_saved, saved_names

_YEAR_S = 365 * 24 * 3600
# above the last entries of MLflow's side bar, where it covers nothing
LINK = (
    '<a id="mixlab-compare" href="./compare" style="position:fixed;left:12px;bottom:96px;z-index:1000;'
    "padding:8px 14px;border-radius:8px;background:#0b5cad;color:#fff;font:600 13px system-ui,sans-serif;"
    'text-decoration:none;box-shadow:0 1px 4px rgba(0,0,0,.35)">Compare mixers</a>'
)


def create_app() -> Any:
    """MLflow's application with the pages below; all of them are read-only."""
    app = mlflow_private.flask_app()
    add_pages(app, mlflow_private.static_prefix())
    return mlflow_private.server_app(app)


def add_pages(app: Flask, prefix: str) -> None:
    """Add to ``app``, all GET-only and under ``prefix``:

    /compare                          the page
    /compare/sweeps                   names of the sweeps in the store, newest first
    /compare/data?experiment=NAME     one sweep: what `mixlab compare --json` prints, and its runs
    /compare/static/..., /compare/plotly.js

    and a link to /compare on MLflow's index page.
    """
    routes = {
        "/compare": page,
        "/compare/sweeps": sweeps,
        "/compare/data": data,
        "/compare/plotly.js": plotly_js,
        "/compare/static/<path:name>": static_file,
    }
    for rule, view in routes.items():
        app.add_url_rule(prefix + rule, f"mixlab_{view.__name__}", view, methods=["GET"])

    @app.before_request
    def read_index_afresh() -> None:
        # a browser that knows MLflow's index without our link must not be told that it is unchanged
        if request.path in (f"{prefix}/", prefix):
            request.environ.pop("HTTP_IF_NONE_MATCH", None)
            request.environ.pop("HTTP_IF_MODIFIED_SINCE", None)

    @app.after_request
    def add_link(response: Response) -> Response:
        is_index = request.method == "GET" and request.path in (f"{prefix}/", prefix)
        if is_index and response.status_code == 200 and response.mimetype == "text/html":
            response.direct_passthrough = False
            response.set_data(response.get_data(as_text=True).replace("</body>", f"{LINK}</body>", 1))
            for name in ("ETag", "Last-Modified"):
                response.headers.pop(name, None)
            response.headers["Cache-Control"] = "no-cache"
        return response


def page() -> Response:
    return Response(dashboard_page(), mimetype="text/html", headers={"Cache-Control": "no-cache"})


def static_file(name: str) -> Response:
    return send_from_directory(STATIC, name, max_age=0)


def plotly_js() -> Response:
    # its address carries the version, so that it may be kept for good
    return send_file(PLOTLY_JS, mimetype="text/javascript", max_age=_YEAR_S)


def sweeps() -> Response:
    found = sweep_experiments(_client())
    return _json([{"id": entry.experiment_id, "name": entry.name} for entry in found])


def data() -> Response:
    experiment = request.args.get("experiment", "")
    try:
        entry = find_experiment(_client(), experiment)
        plan = _plan_on_disk(entry.name)
        saved, rows = rows_from_mlflow_runs(_client(), entry.name, plan)
        x, y = request.args.get("x") or "cost/state_bytes", request.args.get("y") or saved.metric["report"]
        lines = compare(saved, rows, x, y)
        check_axis("x", x, saved, lines)
        check_axis("y", y, saved, lines)
    except UserError as error:
        return _json({"error": str(error)}, status=404)
    return _json(payload(saved, rows, lines, x=x, y=y, experiment_id=entry.experiment_id))


def _plan_on_disk(sweep: str) -> SavedSweep | None:
    """The sweep's own plan where the server runs beside the runs: it knows the order and what is still missing."""
    runs: Path = runs_root()
    return read_saved(runs, sweep) if sweep in saved_names(runs) else None


@cache
def _client() -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=mlflow_private.store_uri())


def _json(value: Any, status: int = 200) -> Response:
    return Response(
        json.dumps(value, allow_nan=False),
        status=status,
        mimetype="application/json",
        headers={"Cache-Control": "no-store"},
    )
