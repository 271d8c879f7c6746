"""Every name of MLflow that is not part of its public interface, in one place and held by a test.

Written against MLflow 3.17. When an upgrade breaks one of these, this file is what has to change.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from flask import Flask, g
from mlflow.environment_variables import _MLFLOW_SGI_NAME
from mlflow.server.constants import BACKEND_STORE_URI_ENV_VAR
from mlflow.server.handlers import STATIC_PREFIX_ENV_VAR


class Tables(NamedTuple):
    """MLflow's tables as SQLAlchemy knows them."""

    experiments: Any
    experiment_tags: Any
    runs: Any
    tags: Any
    params: Any
    latest_metrics: Any


def flask_app() -> Flask:
    """The Flask application that holds MLflow's routes and pages."""
    from mlflow.server import app

    return app


def server_app(app: Flask) -> Any:
    """What the server's process must run: under uvicorn the ASGI application around ``app``, else ``app``."""
    if _MLFLOW_SGI_NAME.get() != "uvicorn":
        return app
    from mlflow.server.fastapi_app import create_fastapi_app

    return create_fastapi_app(app)


def store_uri() -> str:
    """The tracking store that this server was started on."""
    return os.environ[BACKEND_STORE_URI_ENV_VAR]


def static_prefix() -> str:
    """The path that all routes start with: "" or "/prefix"."""
    return os.environ.get(STATIC_PREFIX_ENV_VAR, "").rstrip("/")


def tables() -> Tables:
    from mlflow.store.tracking.dbmodels import models

    return Tables(
        models.SqlExperiment.__table__,
        models.SqlExperimentTag.__table__,
        models.SqlRun.__table__,
        models.SqlTag.__table__,
        models.SqlParam.__table__,
        models.SqlLatestMetric.__table__,
    )


def protected_app(app: Flask, routes: Iterable[str]) -> Any:
    """What the server's process must run so that every call needs a login, as MLflow's own basic authentication.

    MLflow refuses a route that it has no rule for. ``routes`` (paths without a variable part, GET only) are open to
    everybody who is logged in: their views must ask :func:`readable_experiments` before they show an experiment.
    """
    from mlflow.server import auth

    rules = auth.BEFORE_REQUEST_VALIDATORS
    # MLflow lets everybody with a login make new experiments and models, and own them: a reader would be a writer.
    for place, rule in list(rules.items()):
        if getattr(rule, "__name__", "").startswith("validate_can_create_") or place == (auth.DEMO_GENERATE, "POST"):
            rules[place] = lambda rule=rule: _may_write_somewhere() and rule()
    for route in routes:
        rules[(route, "GET")] = auth._allow_authenticated
    return auth.create_app(app)


def _may_write_somewhere() -> bool:
    """Whether the user of the present request may change at least one experiment."""
    from mlflow.server import auth

    user = auth.store.get_user(g.mlflow_authenticated_user)
    grants = auth.store.list_grants(user.id, auth.DEFAULT_WORKSPACE_NAME, {auth.RESOURCE_TYPE_EXPERIMENT})
    return any(auth.get_permission(grant.permission).can_update for grant in grants)


def readable_experiments(ids: list[str]) -> list[str]:
    """Those of ``ids`` that the user of the present request may read, runs included; none without a user.

    The rule of MLflow's own search for runs (a grant on the experiment, on all, or the default permission), and the
    rule of its page of one experiment: both must agree.
    """
    from mlflow.server import auth

    user = g.get("mlflow_authenticated_user")
    if not user:
        return []
    if auth.store.get_user(user).is_admin:
        return ids
    runs = auth.Requirement(auth.RESOURCE_TYPE_RUN, "*", auth.ACTION_NOT_DENIED)
    listed = auth._role_based_read_predicate(user, "experiment", also_require=[runs])
    return [one for one in ids if listed(one) and auth._get_experiment_permission(one, user).can_read]
