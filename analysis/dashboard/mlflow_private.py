"""Every name of MLflow that is not part of its public interface, in one place and held by a test.

Written against MLflow 3.17. When an upgrade breaks one of these, this file is what has to change.
"""

from __future__ import annotations

import os
from typing import Any

from flask import Flask
from mlflow.environment_variables import _MLFLOW_SGI_NAME
from mlflow.server.constants import BACKEND_STORE_URI_ENV_VAR
from mlflow.server.handlers import STATIC_PREFIX_ENV_VAR


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
