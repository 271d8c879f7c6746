"""MLflow without its global state: a client for a stated store, quiet, with its errors as one line."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from experiments.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient


def load_mlflow(uri: str = "") -> None:
    """Import MLflow without its telemetry and messages: what goes wrong is reported in our own words.

    With a ``uri``, also what its kind of store needs.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # A server that is gone or hangs is an error soon: MLflow's own seven tries of two minutes each would hide it.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    import mlflow.tracking

    if uri and not uri.startswith("http"):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("mlflow.store.db", "urllib3.connectionpool"):  # every try at a store that is gone, with a traceback
        logging.getLogger(name).setLevel(logging.CRITICAL)


def client_of(uri: str) -> MlflowClient:
    """A client of the store at ``uri``."""
    load_mlflow()
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def all_runs(client: MlflowClient, experiment_id: str, condition: str = "") -> Iterator[Run]:
    """The runs of an experiment that meet ``condition``, oldest first, page by page."""
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], condition, max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def shown(uri: str) -> str:
    """The URI without a password."""
    return re.sub(r"://([^/@:]*):[^/@]*@", r"://\1:***@", uri)


def one_line(error: BaseException) -> str:
    """The first telling line of an error's message; SQLAlchemy begins some with a hint in brackets."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("(raised as a result of")] or lines
    return shown(lines[0]) if lines else type(error).__name__


@contextmanager
def store_errors(uri: str, way_out: str) -> Iterator[None]:
    """Whatever a store raises becomes one :class:`UserError` line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - boundary: MLflow, SQLAlchemy, database drivers and HTTP raise anything
        raise UserError(f"tracking store {shown(uri)}: {one_line(error)}; {way_out}") from None
