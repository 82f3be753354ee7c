"""How this project comes to MLflow: quietly, and with an answer or an error within seconds rather than minutes."""

from __future__ import annotations

import logging
import os
from typing import Any

QUIET = (("MLFLOW_LOGGING_LEVEL", "WARNING"), ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
         ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"), ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
         ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"))


def quiet_import(uri: str) -> None:
    """Imports all of mlflow that is used with `uri`. Call it in the main thread: two threads that import the same packages
    can deadlock."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name, value in QUIET:
        os.environ.setdefault(name, value)
    import mlflow.pyfunc
    import mlflow.tracking  # noqa: F401

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if "://" in uri and not uri.startswith("http"):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def connect(uri: str) -> Any:
    """An MlflowClient of `uri`; touches no global state of MLflow's."""
    quiet_import(uri)
    from mlflow import MlflowClient

    return MlflowClient(uri)
