"""MLflow's server application with our pages added; the entry points `mixlab` of group `mlflow.app`."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

from flask import Flask, Response, request

from analysis.dashboard import mlflow_private
from analysis.dashboard.answers import Answer, Answers, answer, respond, takes_gzip
from analysis.dashboard.pages import PARTS, page, part
from analysis.dashboard.store import Store, VisibleStore
from analysis.dashboard.views import Views
from analysis.runs import find_experiment, sweep_experiments
from experiments.errors import UserError
from experiments.paths import runs_root

_YEAR_S = 365 * 24 * 3600
_WARM = 30  # sweeps, fewer than the answers that are kept
# Scripts from here only, and none in the page itself: a name that became markup could still do nothing.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
_SECURITY = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}
# above the last entries of MLflow's side bar, where it covers nothing
LINK = (
    '<a id="mixlab-compare" href="./sweeps" style="position:fixed;left:12px;bottom:96px;z-index:1000;'
    "padding:8px 14px;border-radius:8px;background:#0b5cad;color:#fff;font:600 13px system-ui,sans-serif;"
    'text-decoration:none;box-shadow:0 1px 4px rgba(0,0,0,.35)">Compare mixers</a>'
)


def create_app() -> Any:
    """MLflow's application with the pages below, for whoever can reach it; all of them are read-only."""
    app = mlflow_private.flask_app()
    add_pages(app, mlflow_private.static_prefix(), everything)
    return mlflow_private.server_app(app)


def create_protected_app() -> Any:
    """The same behind MLflow's basic authentication: a user sees the experiments that MLflow lets this user read."""
    app = mlflow_private.flask_app()
    routes = add_pages(app, mlflow_private.static_prefix(), mlflow_private.readable_experiments)
    return mlflow_private.protected_app(app, routes)


def everything(experiment_ids: list[str]) -> list[str]:
    """Without a login everybody may read every experiment."""
    return experiment_ids


def add_pages(app: Flask, prefix: str, may_read: Callable[[list[str]], list[str]]) -> list[str]:
    """Add to ``app``, all GET-only and under ``prefix``, and give the paths added:

    /sweeps, /compare, /mixers                        the pages
    /sweeps/data                                      where every sweep stands
    /compare/sweeps                                   names and ids of the sweeps, newest first
    /compare/data?experiment=NAME[&x&y&tag]           one sweep: what `mixlab compare --json` prints
    /compare/statistics?experiment=NAME[&x&y&tag]     what is inferred beside the means, and how it was made
    /compare/runs?experiment=NAME&arm&cell[&tag]      the runs of one arm and cell
    /compare/seeds?experiment=NAME&x&y[&tag]          two values of every replicate
    /mixers/data[?name=NAME]                          all mixers, or one
    /compare/static/...                               the style, and the script of every page

    and a link to /sweeps on MLflow's index page. ``may_read`` says which experiments the user of the present request
    may see; the others are to our pages as if they were not there.
    """
    server = _Server(may_read)
    views: dict[str, Callable[[], Response]] = {
        "/sweeps/data": server.overview,
        "/compare/sweeps": server.names,
        "/compare/data": lambda: server.of_sweep(server.views.comparison, "x", "y"),
        "/compare/statistics": lambda: server.of_sweep(server.views.statistics, "x", "y"),
        "/compare/runs": lambda: server.of_sweep(server.views.runs_of, "arm", "cell"),
        "/compare/seeds": lambda: server.of_sweep(server.views.seeds, "x", "y"),
        "/mixers/data": server.mixers,
        "/sweeps": lambda: _page("sweeps"),
        "/compare": lambda: _page("compare"),
        "/mixers": lambda: _page("mixers"),
        **{f"/compare/static/{name}": (lambda name=name: _part(name)) for name in PARTS},
    }
    for rule, view in views.items():
        app.add_url_rule(prefix + rule, f"mixlab {rule}", view, methods=["GET"])
    server.warm_up()

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

    return [prefix + rule for rule in views]


class _Server:
    """Answers the requests of our pages."""

    def __init__(self, may_read: Callable[[list[str]], list[str]]) -> None:
        self._may_read = may_read
        self._answers = Answers()
        self.views = Views(runs_root())
        self._store: Store | None = None
        self._lock = threading.Lock()

    def overview(self) -> Response:
        store = self._visible()
        return self._respond("overview", store, sweep_experiments(store), lambda: self.views.overview(store))

    def names(self) -> Response:
        found = sweep_experiments(self._visible())
        return respond(answer([{"id": entry.experiment_id, "name": entry.name} for entry in found]))

    def of_sweep(self, view: Callable[..., Any], *names: str) -> Response:
        """``view`` of the sweep that the request names, given the request's values of ``names`` and its tags."""
        given = request.args
        store, sweep, tags = self._visible(), given.get("experiment", ""), given.getlist("tag")
        values = [given.get(name, "") for name in names]
        try:
            entry = find_experiment(store, sweep)
        except UserError as error:
            return respond(answer({"error": str(error)}, 404))
        question = (view.__name__, *values, *tags)
        return self._respond(question, store, [entry], lambda: view(store, sweep, *values, tags))

    def mixers(self) -> Response:
        store, name = self._visible(), request.args.get("name")
        make = (lambda: self.views.mixers(store)) if name is None else (lambda: self.views.mixer(store, name))
        question = ("mixers", name, self.views.results_state())
        return self._respond(question, store, sweep_experiments(store), make)

    def warm_up(self) -> None:
        """Read the store, and compare what is newest, before anybody asks; what fails is said to whoever asks."""

        def read() -> None:
            try:
                store = VisibleStore(self._opened(), everything)
                sweeps = sweep_experiments(store)
                for entry in sweeps:
                    store.runs(entry.experiment_id, params=True)
                for entry in sweeps[:_WARM]:
                    make = partial(self.views.comparison, store, entry.name, "", "", [])
                    self._answer(("comparison", "", ""), store, [entry], make)
            except Exception:  # noqa: BLE001 - boundary: a store that can't be read now may be readable later
                return

        threading.Thread(target=read, name="mixlab warm-up", daemon=True).start()

    def _respond(self, question: Hashable, store: VisibleStore, about: list[Any], make: Callable[[], Any]) -> Response:
        return respond(self._answer(question, store, about, make))

    def _answer(self, question: Hashable, store: VisibleStore, about: list[Any], make: Callable[[], Any]) -> Answer:
        """``about``: the experiments that the answer depends on. With the user's view they are part of its state."""

        def made() -> Answer:
            try:
                return answer(make())
            except UserError as error:
                return answer({"error": str(error)}, 404)

        state = self.views.state(store, about)
        return self._answers.get((question, tuple(entry.experiment_id for entry in about)), state, made)

    def _visible(self) -> VisibleStore:
        return VisibleStore(self._opened(), self._may_read)

    def _opened(self) -> Store:
        with self._lock:
            if self._store is None:
                self._store = Store(mlflow_private.store_uri())
            return self._store


def _page(name: str) -> Response:
    return Response(page(name), mimetype="text/html", headers={"Cache-Control": "no-cache", **_SECURITY})


def _part(name: str) -> Response:
    # its address in a page changes with it, so that a browser may keep it for good
    headers = {"Cache-Control": f"public, max-age={_YEAR_S}, immutable", "Vary": "Accept-Encoding", **_SECURITY}
    kind = "text/css" if name.endswith(".css") else "text/javascript"
    body = part(name).encode()
    if takes_gzip(body):
        body = gzip.compress(body, 6, mtime=0)
        headers["Content-Encoding"] = "gzip"
    return Response(body, mimetype=kind, headers=headers)
